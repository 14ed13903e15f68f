"""The inputs that attention is tried with."""

from collections.abc import Iterator
from typing import Any

import torch

from fastsd_kernels.testing.inputs import BadSample, Sample, random_tensor
from fastsd_kernels.testing.tokens import LAYOUTS, in_heads, tokens

# Constants of the Triton backend with which these samples take the paths of large inputs:
# several tiles of queries and of keys
SMALL_TILES = {
    "MOST_M": 32,
    "MOST_N": 32,
    "MOST_Q_ELEMENTS": 1,
    "MOST_K_ELEMENTS": 1,
}


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Every awkward input of the contract, small enough for an interpreter."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}

    def sample(
        name: str, queries: int, keys: int, width: int = 8, heads: int = 2, batch: int = 1,
        layout: str = "contiguous", **given: Any,
    ) -> Sample:  # fmt: skip
        q = in_heads(batch, heads, queries, width, layout, **like, seed=1)
        k, v = (in_heads(batch, heads, keys, width, layout, **like, seed=seed) for seed in (2, 3))
        return Sample(name, {"q": q, "k": k, "v": v} | given)

    def bias(batch: int, keys: int, **other: Any) -> dict[str, Any]:
        return {"bias": random_tensor((batch, keys), **like | other, seed=4)}

    for layout in LAYOUTS:
        q, k, v = tokens(2, 2, 33, 8, layout, **like)
        yield Sample(layout, {"q": q, "k": k, "v": v})
        yield sample(f"{layout}_across", 20, 13, batch=2, layout="contiguous" if layout == "packed" else layout)
    for layouts in (("contiguous", "token_major", "packed"), ("packed", "contiguous", "token_major")):
        q, k, v = (tokens(2, 2, 33, 8, layout, **like)[i] for i, layout in enumerate(layouts))
        yield Sample(f"{'_'.join(layouts)}_as_q_k_v", {"q": q, "k": k, "v": v})
    for width in (40, 64, 80, 160, 1, 7, 33):
        yield sample(f"width_{width}", 18, 21, width)
    for queries, keys in ((1, 1), (1, 77), (64, 77), (63, 1), (65, 130), (129, 257), (17, 300)):
        yield sample(f"{queries}_queries_{keys}_keys", queries, keys)
        yield sample(f"{queries}_queries_{keys}_keys_biased", queries, keys, heads=1, batch=2, **bias(2, keys))
    yield sample("shared_bias", 9, 20, batch=3, **bias(1, 20))
    yield sample("expanded_bias", 9, 20, batch=3, bias=random_tensor((3, 1), **like).expand(-1, 20))
    other = torch.float32 if dtype != torch.float32 else torch.float64
    yield sample("bias_of_another_dtype", 9, 20, **bias(1, 20, dtype=other))
    left_out = torch.zeros(2, 40, **like)
    left_out[0, 7:] = -torch.inf
    left_out[1, :33] = -torch.inf
    yield sample("keys_left_out", 35, 40, batch=2, bias=left_out)
    # whole tiles of them: the first, the second, all but the last, all but one key
    left_out = torch.zeros(5, 130, **like)
    for row, (first, end) in enumerate(((0, 64), (64, 128), (64, 130), (0, 128), (0, 129))):
        left_out[row, first:end] = -torch.inf
    yield sample("tiles_left_out", 17, 130, heads=1, batch=5, bias=left_out)
    yield sample("own_scale", 20, 20, scale=0.7)
    yield sample("no_scale", 20, 20, scale=0.0)
    yield sample("negative_scale", 20, 20, scale=-0.5)
    yield sample("three_heads", 20, 31, heads=3, layout="token_major")
    yield sample("empty_batch", 4, 4, batch=0)
    yield sample("no_heads", 4, 4, heads=0)
    yield sample("no_queries", 0, 4)

    far = sample("large_scores", 40, 40).kwargs
    # a softmax that does not take the maximum off overflows, here at e^400
    yield Sample("large_scores", far | {"q": far["q"] * 100})
    k = torch.nn.functional.normalize(far["k"].float(), dim=-1).to(dtype)
    yield Sample("one_key_wins", far | {"q": k * 1000, "k": k})
    near = sample("equal_scores", 40, 40).kwargs
    yield Sample("equal_scores", near | {"k": near["k"][:, :, :1].expand_as(near["k"])})
    yield Sample("large_values", near | {"v": near["v"] * 1000 + 3000})
    yield sample(
        "nan_all_keys_left_out", 5, 20, batch=2, bias=torch.tensor([[-torch.inf], [0.0]], **like).expand(2, 20)
    )
    for name, value in (("nan", torch.nan), ("inf", torch.inf), ("minus_inf", -torch.inf)):
        for of in ("q",) if name == "minus_inf" else ("q", "k", "v", "bias"):
            broken = sample(name, 40, 40, batch=2, **(bias(2, 40) if of == "bias" else {})).kwargs
            broken[of].view(-1)[363 % broken[of].numel()] = value  # of one head, or of one sample
            yield Sample(f"{name}_in_{of}", broken)


def large_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Sizes where a 16-bit grid dimension would overflow."""
    for layout in ("contiguous", "token_major"):
        q, k, v = tokens(65_537, 2, 4, 2, layout, device=device, dtype=dtype)
        yield Sample(f"batch_65537_{layout}", {"q": q, "k": k, "v": v})


def bad_samples(device: torch.device | str) -> Iterator[BadSample]:
    """Calls that must be refused, with what the message must name."""
    q, k = (random_tensor((2, 3, count, 8), device, torch.float32) for count in (12, 7))
    given = {"q": q, "k": k, "v": k}

    def bad(name: str, error: type[Exception], says: tuple[str, ...], **changes: Any) -> BadSample:
        return BadSample(name, given | changes, error, says)

    yield bad("three_dimensions", ValueError, ("q", "(3, 12, 8)"), q=q[0])
    yield bad("k_of_three_dimensions", ValueError, ("k", "(2, 3, keys, 8)", "(3, 7, 8)"), k=k[0])
    yield bad("heads", ValueError, ("k", "(2, 3, keys, 8)", "(2, 2, 7, 8)"), k=k[:, :2])
    yield bad("width_of_k", ValueError, ("k", "(2, 3, keys, 8)", "(2, 3, 7, 5)"), k=k[..., :5])
    yield bad("keys_of_v", ValueError, ("v", "(2, 3, 7, 8)", "(2, 3, 6, 8)"), v=k[:, :, 1:])
    yield bad("no_width", ValueError, ("q", "width", "(2, 3, 12, 0)"), q=q[..., :0], k=k[..., :0], v=k[..., :0])
    yield bad("no_keys", ValueError, ("k", "at least one key", "(2, 3, 0, 8)"), k=k[:, :, :0], v=k[:, :, :0])
    yield bad("bias_shape", ValueError, ("bias", "(2, 7)", "(2, 12)"), bias=q.new_ones(2, 12))
    yield bad("bias_batch", ValueError, ("bias", "(1, 7)", "(3, 7)"), bias=q.new_ones(3, 7))
    yield bad("bias_for_queries", ValueError, ("bias", "(2, 7)", "(2, 12, 7)"), bias=q.new_ones(2, 12, 7))
    yield bad("bias_dtype", TypeError, ("bias", "bool"), bias=q.new_ones(2, 7).bool())
    yield bad("scale", ValueError, ("scale", "nan"), scale=float("nan"))
    yield bad("integer_q", TypeError, ("q", "floating-point", "int64"), q=q.long())
    yield bad("dtype_of_k", TypeError, ("k", "float32", "float16"), k=k.half())
    yield bad("device_of_v", ValueError, ("v", "cpu", "meta"), v=k.to("meta"))
    yield bad("backend_name", ValueError, ("backend", "'numpy'"), backend="numpy")
