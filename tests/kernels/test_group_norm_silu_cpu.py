"""What only the CPU C++ kernel promises: the same bits with any number of threads, and real sizes."""

import os
import sys

import pytest
import torch

from fastsd_kernels import cpu_runtime, group_norm_silu
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.group_norm_silu import op
from fastsd_kernels.testing import feature_map

LAYOUTS = ("contiguous", "channels_last")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(layout, dtype):
    x = feature_map((3, 96, 40, 33), layout, device="cpu", dtype=dtype)
    skip = feature_map((3, 64, 40, 33), layout, device="cpu", dtype=dtype, seed=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(group_norm_silu(x, 32, skip=skip, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(2, 320, 64, 64), (1, 1280, 16, 16), (2, 1920, 8, 8), (1, 128, 181, 127)], ids=str)
def test_real_sizes(layout, size):
    x = feature_map(size, layout, device="cpu", dtype=torch.float32)
    exact = group_norm_silu(x.double(), 32, backend="reference")
    assert (group_norm_silu(x, 32, backend="cpu") - exact).abs().max() <= 2e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_far_from_zero_at_a_real_size(layout):
    x = feature_map((1, 320, 64, 64), layout, device="cpu", dtype=torch.float32) + 10_000
    shift = feature_map((1, 320), "contiguous", device="cpu", dtype=torch.float32) * 1000
    exact = group_norm_silu(x.double(), 32, channel_bias=shift.double(), backend="reference")
    assert (group_norm_silu(x, 32, channel_bias=shift, backend="cpu") - exact).abs().max() <= 1e-5


def test_refusals():
    with pytest.raises(BackendUnavailable, match="float64"):
        group_norm_silu(torch.zeros(1, 4, 2, 2, dtype=torch.float64), 2, backend="cpu")
    assert "needs CPU tensors" in op.backends["cpu"].reject(torch.zeros(1, 4, 2, 2, device="meta"))


def test_missing_extension_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastsd_kernels._cpu", None)
    monkeypatch.delattr("fastsd_kernels._cpu", raising=False)
    assert "install a C++17 compiler" in cpu_runtime.unavailable.__wrapped__()


def test_unknown_instruction_set_is_a_sentence(monkeypatch):
    monkeypatch.setenv("FASTSD_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"FASTSD_CPU_ISA: expected one of baseline.*'sse9'"):
        cpu_runtime.isa.__wrapped__()


def test_more_than_2_31_elements():
    elements = 2**31 + 2**20
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < 5 * elements:
        pytest.skip(f"needs {5 * elements / 2**30:.0f} GiB of free memory")
    x = torch.empty(elements // 2**20, 2**10, 2**10, dtype=torch.float16)[:, :, :, None]
    x[:-1] = 1
    x[-1] = feature_map((2**10, 2**10, 1), "contiguous", device="cpu", dtype=torch.float16)
    last = group_norm_silu(x[-1:].clone(), 32, backend="cpu")
    assert torch.equal(group_norm_silu(x, 32, backend="cpu")[-1:], last)
