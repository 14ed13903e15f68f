"""What is particular to attention's CPU backend: sizes of models, threads, and blocks of keys."""

import pytest
import torch

from fastsd_kernels import attention
from fastsd_kernels.attention import op
from fastsd_kernels.testing import Sample, check_op
from fastsd_kernels.testing.tokens import LAYOUTS, in_heads, tokens

# heads, queries, keys, width
SHAPES = {
    "sd15": (8, 4096, 4096, 40),
    "sd15_text": (8, 4096, 77, 40),
    "sd15_deep": (8, 256, 256, 160),
    "sdxl": (10, 1024, 1024, 64),
    "vae": (1, 1024, 1024, 512),
}


def sample(name, dtype):
    heads, queries, keys, width = SHAPES[name]
    sizes = (("q", queries), ("k", keys), ("v", keys))
    like = {"device": "cpu", "dtype": dtype}
    return Sample(
        name, {of: in_heads(1, heads, count, width, "token_major", **like, seed=ord(of)) for of, count in sizes}
    )


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "sd15"])
def test_sizes_of_models(name):
    check_op(op, sample(name, torch.float32), "cpu")


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "strided_width"])
@pytest.mark.parametrize("keys", [1031, 5])
def test_keys_and_values_that_are_copied(layout, keys):
    """Many queries read those of a head side by side, wherever they lie; each sample and head its own."""
    q, k, v = tokens(2, 3, 1031, 9, layout, device="cpu", dtype=torch.float32)
    check_op(op, Sample(layout, {"q": q, "k": k[:, :, -keys:], "v": v[:, :, :keys]}), "cpu")
    # one of the two lies so already
    check_op(op, Sample(layout, {"q": q, "k": k[:, :, -keys:].contiguous(), "v": v[:, :, :keys]}), "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    given = sample("sd15", dtype).kwargs
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(attention(**given, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_keys_beyond_a_block_count():
    """Each key in turn has all the weight, also behind the first block of keys."""
    k = torch.zeros(1, 1, 360, 4)
    v = torch.arange(360.0)[None, None, :, None].expand(1, 1, 360, 4)
    for token in (0, 29, 127, 128, 129, 255, 256, 359):
        k[0, 0, token] = 100.0
        y = attention(torch.ones(1, 1, 33, 4), k, v, scale=1.0, backend="cpu")
        assert torch.equal(y, torch.full_like(y, float(token)))
        k[0, 0, token] = 0.0
        bias = torch.full((1, 360), -torch.inf)
        bias[0, token] = 3.0
        y = attention(torch.ones(1, 1, 33, 4), k, v, bias=bias, backend="cpu")
        assert torch.equal(y, torch.full_like(y, float(token)))


def test_tensors_that_are_not_the_ops_are_refused():
    q = torch.randn(1, 2, 16, 4)
    none = q[:, :, :0]
    with pytest.raises(ValueError, match="at least one token"):
        torch.ops.fastsd_cpu.attention.default(q, none, none, None, 1.0, 0, torch.empty_like(q))
