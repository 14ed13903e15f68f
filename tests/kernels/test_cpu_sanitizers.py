"""The CPU kernels of every op under AddressSanitizer and UBSan: all samples, every instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SANITIZED = """
import importlib.util, sys
import torch
spec = importlib.util.spec_from_file_location("fastsd_kernels._cpu", sys.argv[1])
sys.modules["fastsd_kernels._cpu"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["fastsd_kernels._cpu"])
from fastsd_kernels import cpu_runtime
from fastsd_kernels import attention, conv2d, linear
from fastsd_kernels.dispatch import ops
from fastsd_kernels.testing import check_op
cpu_runtime.unavailable()
kernels = torch.ops.fastsd_cpu
x, skip, whole = torch.randn(1, 8, 64, 64), torch.randn(1, 8, 32, 64), torch.empty(1, 16, 64, 64)
if "skip of half the rows" in sys.argv:
    kernels.group_norm_silu(x, skip, None, None, None, 4, 1e-5, True, False, 0, whole)
if "norm of half the channels" in sys.argv:
    source = torch.arange(66, dtype=torch.int32) - 1
    weights, norm = torch.randn(16, 8, 3, 3), torch.randn(1, 3, 4)
    kernels.conv2d(x, None, norm, True, source, source, weights, 2, 3, 1, None, None, None, 1.0, 0, whole)
if "means of half the channels" in sys.argv:
    kernels.group_norm_silu_mean(x, None, None, None, 4, 1e-5, True, 0, torch.empty_like(x), torch.empty(1, 4))
if "result of half the tokens" in sys.argv:
    q = torch.randn(1, 2, 64, 8)
    kernels.gri_attention(q, q, q, 8, 8, 4, 4, 2, 2, False, None, None, 1.0, 0, q[:, :, :32].clone())
for isa in range(cpu_runtime.isa() + 1):
    cpu_runtime.isa = lambda isa=isa: isa
    for op in ops():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for sample in op.cases.samples("cpu", dtype):
                check_op(op, sample.map_tensors(lambda t: t.clone()), "cpu")
    for size in (0, 1, 67, 100_003):
        kernels.digest(torch.randn(size), isa)
    for algorithm in ("product", "winograd2", "winograd4"):  # more channels than have their weights transformed at once
        for memory_format in (torch.contiguous_format, torch.channels_last):
            wide = torch.randn(33, 1601, 3, 3).contiguous(memory_format=memory_format)
            conv2d(torch.randn(1, 1601, 7, 5), wide, padding=1, algorithm=algorithm, backend="cpu")
# many rows, weights in two parts, and few rows whose next panels are fetched
for rows in (520, 40):
    x, weight = torch.randn(rows, 1280), torch.randn(2600, 1280)
    linear(x, weight, norm_eps=1e-5, activation="geglu", residual=torch.randn(rows, 1300))
# keys and values that are copied
q, k, v = torch.randn(2, 1031, 3, 3, 9).transpose(1, 3).unbind(2)
attention(q, k[:, :, 7:], v[:, :, :-7])
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


@pytest.mark.parametrize(
    "mistake",
    [
        "skip of half the rows",
        "norm of half the channels",
        "means of half the channels",
        "result of half the tokens",
    ],
)
def test_sanitizers_find_a_planted_overrun(sanitized_extension, mistake):
    result = run_sanitized(sanitized_extension, mistake)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
