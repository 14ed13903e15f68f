"""What is particular to gri_attention's CPU backend: sizes of models, threads, and what is kept of memory."""

import pytest
import torch

from fastsd_kernels import gri_attention
from fastsd_kernels.gri_attention import cases, op
from fastsd_kernels.testing import Sample, check_op

SHAPES = {
    "sd15": (8, (64, 64), 40),
    "sd15_odd": (8, (63, 65), 40),
    "sdxl": (10, (64, 64), 64),
    "wide": (2, (24, 40), 160),
}


def sample(name, dtype, **given):
    heads, grid, width = SHAPES[name]
    q, k, v = cases.tokens(1, heads, grid[0] * grid[1], width, "token_major", device="cpu", dtype=dtype)
    return Sample(name, {"q": q, "k": k, "v": v, "grid": grid, "window": (8, 8), "pool": (8, 8)} | given)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("window", "pool"), [(8, 8), (16, 4)])
def test_sizes_of_models(name, window, pool):
    check_op(op, sample(name, torch.float32, window=(window, window), pool=(pool, pool)), "cpu")


@pytest.mark.parametrize("window", [8, 20, 64, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype, window):
    """Windows of 64 and none are cut into tasks of some queries each."""
    given = sample("sd15", dtype, window=window and (window, window)).kwargs
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(gri_attention(**given, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_keys_beyond_a_block_count():
    """Each key in turn has all the weight, also behind the first block of keys and at the seams of segments."""
    grid, width = (12, 30), 4
    k = torch.zeros(1, 1, 360, width)
    v = torch.arange(360.0)[None, None, :, None].expand(1, 1, 360, width)
    for token in (0, 29, 30, 127, 128, 129, 255, 256, 359):
        q = k.clone()
        k[0, 0, token] = 100.0
        q += 1.0
        y = gri_attention(q, k, v, grid=grid, window=(12, 30), pool=4, scale=1.0, backend="cpu")
        assert torch.equal(y, torch.full_like(y, float(token)))
        k[0, 0, token] = 0.0


def test_a_score_that_underflows_counts_nothing():
    q = torch.ones(1, 1, 2, 1)
    k = torch.tensor([0.0, -1000.0])[None, None, :, None]
    v = torch.tensor([3.0, 7.0])[None, None, :, None]
    y = gri_attention(q, k, v, grid=(1, 2), window=(1, 2), pool=1, scale=1.0, backend="cpu")
    assert y.flatten().tolist() == [3.0, 3.0]


def test_tensors_that_are_not_the_ops_are_refused():
    kernel = torch.ops.fastsd_cpu.gri_attention.default
    q = torch.randn(1, 2, 16, 4)
    with pytest.raises(ValueError, match="tokens of a map"):
        kernel(q, q, q, 4, 5, 2, 2, 2, 2, False, None, None, 1.0, 0, torch.empty_like(q))
