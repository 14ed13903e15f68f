"""Tokens in heads: queries, keys and values as users bring them."""

from typing import Any

from torch import Tensor

from fastsd_kernels.testing.inputs import random_tensor

LAYOUTS = ("contiguous", "token_major", "packed", "sliced_width", "strided_width", "expanded_heads", "storage_offset")


def tokens(batch: int, heads: int, count: int, width: int, layout: str, **like: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, ``[B, heads, N, d]``: dense, as projections give them, packed in one tensor, and stranger ones."""
    if layout == "packed":
        together = random_tensor((batch, count, 3, heads, width), **like)
        q, k, v = together.unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return tuple(in_heads(batch, heads, count, width, layout, **like, seed=seed) for seed in (1, 2, 3))  # type: ignore


def in_heads(batch: int, heads: int, count: int, width: int, layout: str, **like: Any) -> Tensor:
    """``[B, heads, N, d]``."""
    if layout == "token_major":
        return random_tensor((batch, count, heads, width), **like).transpose(1, 2)
    if layout == "sliced_width":
        return random_tensor((batch, heads, count, width + 3), **like)[..., 1:-2]
    if layout == "strided_width":
        return random_tensor((batch, heads, width, count), **like).transpose(2, 3)
    if layout == "expanded_heads":
        return random_tensor((batch, 1, count, width), **like).expand(-1, heads, -1, -1)
    if layout == "storage_offset":
        return random_tensor((batch * heads * count * width + 1,), **like)[1:].view(batch, heads, count, width)
    return random_tensor((batch, heads, count, width), **like)
