"""attention as its definition: plain PyTorch, in any floating-point dtype."""

import math
from typing import Any

import torch
from torch import Tensor

from fastsd_kernels.heads import laid_out_as


def attention(
    q: Tensor,  # [B, heads, N, d]
    k: Tensor,  # [B, heads, M, d]
    v: Tensor,  # [B, heads, M, d]
    bias: Tensor | None,  # [B, M] or [1, M]
    scale: float | None,
) -> Tensor:  # [B, heads, N, d]
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if bias is not None:
        scores = scores + bias.to(q.dtype)[:, None, None]
    return torch.softmax(scores, -1) @ v


def widened(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    """:func:`attention` in float32 or wider, for gradients: scores of 16 bits overflow, and cancel in them."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide: list[Any] = [x.to(dtype) if isinstance(x, Tensor) else x for x in (q, k, v, *args)]
    return attention(*wide).to(q.dtype)


def unavailable() -> str | None:
    return None


def reject(*args: object) -> str | None:
    return None


def run(q: Tensor, *args: object) -> Tensor:
    return laid_out_as(q, attention(q, *args))  # type: ignore[arg-type]
