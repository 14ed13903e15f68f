"""What only the CPU C++ kernel promises: every instruction set, any number of threads, no access out of bounds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsd_kernels import cpu_runtime, group_norm_silu
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.group_norm_silu import cases, op
from fastsd_kernels.testing import check_op, feature_map, named

ROOT = Path(__file__).parents[2]
SAMPLES = [sample.name for sample in cases.samples("cpu", torch.float32)]
LAYOUTS = ("contiguous", "channels_last")


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_instruction_sets(isa, name, monkeypatch):
    index = cpu_runtime.ISAS.index(isa)
    if index > cpu_runtime.isa():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setattr(cpu_runtime, "isa", lambda: index)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_op(op, named(cases.samples("cpu", dtype), name), "cpu")


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


SANITIZED = """
import importlib.util, sys
import torch
spec = importlib.util.spec_from_file_location("fastsd_kernels._cpu", sys.argv[1])
sys.modules["fastsd_kernels._cpu"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["fastsd_kernels._cpu"])
from fastsd_kernels import cpu_runtime
from fastsd_kernels.group_norm_silu import cases, op
from fastsd_kernels.testing import check_op
from torch import Tensor
if len(sys.argv) > 2:  # planted: a skip of half the rows
    torch.ops.fastsd_cpu.group_norm_silu(
        torch.randn(1, 8, 64, 64), torch.randn(1, 8, 32, 64), None, None, None, 4, 1e-5, True, False, 0,
        torch.empty(1, 16, 64, 64))
for isa in range(cpu_runtime.isa() + 1):
    cpu_runtime.isa = lambda isa=isa: isa
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for sample in cases.samples("cpu", dtype):
            check_op(op, sample.map_tensors(lambda t: t.clone()), "cpu")
print("sanitized run complete")
"""


@pytest.fixture(scope="module")
def sanitized_extension():
    folder = ROOT / "build" / "sanitized"
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1"
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={folder}", f"--build-temp={folder}/objects"],
        cwd=ROOT,
        env=os.environ | {"FASTSD_EXTRA_CFLAGS": flags},
        check=True,
        capture_output=True,
    )
    return next((folder / "fastsd_kernels").glob("_cpu*.so"))


def run_sanitized(extension, *more):
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return subprocess.run(
        [sys.executable, "-c", SANITIZED, str(extension), *more],
        env=os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_sanitizers_find_nothing(sanitized_extension):
    result = run_sanitized(sanitized_extension)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "sanitized run complete" in result.stdout


def test_sanitizers_find_a_planted_overrun(sanitized_extension):
    result = run_sanitized(sanitized_extension, "planted")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
