"""What only the CPU C++ kernel promises: the same bits with any number of threads, and real sizes."""

import os
import sys

import pytest
import torch

from fastsd_kernels import cpu_runtime, group_norm_silu
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.group_norm_silu import op
from fastsd_kernels.testing import feature_map
from fastsd_kernels.testing.inputs import random_tensor

LAYOUTS = ("contiguous", "channels_last")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(3, 96, 40, 33), (3, 1216, 9, 9)], ids=str)
def test_threads_do_not_change_a_bit(layout, dtype, size):
    x = feature_map(size, layout, device="cpu", dtype=dtype)
    skip = feature_map((size[0], 64, *size[2:]), layout, device="cpu", dtype=dtype, seed=1)
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


@pytest.mark.parametrize("skip_channels", [0, 300, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bundles_of_groups(skip_channels, dtype):
    """A small channels-last map, cut by groups: 9 of them, two to a bundle, which may lie across x and skip."""
    like = {"device": "cpu", "dtype": dtype}
    x = feature_map((2, 1152 - skip_channels, 9, 8), "channels_last", **like)
    skip = feature_map((2, skip_channels, 9, 8), "channels_last", **like, seed=1) if skip_channels else None
    weight, bias = (random_tensor((1152,), **like, seed=seed) for seed in (2, 3))
    shift = random_tensor((2, 1152), **like, seed=4)
    given = {"x": x, "weight": weight, "bias": bias, "channel_bias": shift, "skip": skip}
    doubles = {name: None if value is None else value.double() for name, value in given.items()}
    exact = group_norm_silu(**doubles, num_groups=9, backend="reference")
    tolerance = 4e-6 if dtype is torch.float32 else 4e-3
    assert (group_norm_silu(**given, num_groups=9, backend="cpu") - exact).abs().max() <= tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [80.0, 87.5, 88.3, 88.7, 89.0, 100.0, 1e10, 1e38])
def test_silu_far_from_zero(layout, size):
    """A group of -1 and 1, times a weight: for a large u, SiLU is u; for a small one, next to nothing."""
    x = torch.tensor([-1.0, 1.0]).repeat(16).reshape(1, 2, 4, 4).to(memory_format=FORMATS[layout])
    y = group_norm_silu(x, 1, torch.full((2,), size), eps=0.0, backend="cpu")
    torch.testing.assert_close(y[x > 0], torch.full((16,), size))
    assert y[x < 0].abs().max() <= 2e-33  # 80 exp(-80)


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
    monkeypatch.setattr(cpu_runtime, "extension", cpu_runtime.extension.__wrapped__)
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
