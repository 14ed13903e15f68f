"""What the runtimes say where kernels cannot run."""

import sys

import pytest
import torch

from fastsd_kernels import cpu_runtime, triton_runtime


def test_missing_cpu_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastsd_kernels._cpu", None)
    monkeypatch.delattr("fastsd_kernels._cpu", raising=False)
    monkeypatch.setattr(cpu_runtime, "extension", cpu_runtime.extension.__wrapped__)
    assert "install a C++17 compiler" in cpu_runtime.unavailable.__wrapped__()


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("FASTSD_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"FASTSD_CPU_ISA: expected one of baseline.*'sse9'"):
        cpu_runtime.isa.__wrapped__()


def test_missing_compiler_of_tritons_launcher(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    assert triton_runtime.unavailable.__wrapped__() is None
    monkeypatch.setenv("PATH", "")
    assert "install gcc or clang" in triton_runtime.unavailable.__wrapped__()


def test_bfloat16_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_runtime, "INTERPRETED", True)
    for words in ("bfloat16", "TRITON_INTERPRET"):
        assert words in triton_runtime.reject(torch.ones(1, dtype=torch.bfloat16))
    assert triton_runtime.reject(torch.ones(1, dtype=torch.float16)) is None
