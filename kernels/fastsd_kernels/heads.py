"""Tokens in heads, ``[B, heads, N, d]``: where they lie."""

from collections.abc import Callable

import torch
from torch import Tensor


def is_token_major(x: Tensor) -> bool:
    """Whether ``x [B, heads, N, d]`` keeps the heads of a token side by side, as a projection gives them."""
    return x.shape[1] > 1 and x.stride(1) < x.stride(2)


def empty_heads(q: Tensor, empty: Callable[..., Tensor] = torch.empty_permuted) -> Tensor:
    """The uninitialised result ``[B, heads, N, d]``, dense, with the heads where ``q`` has them, made by ``empty``."""
    return empty(q.shape, (0, 2, 1, 3) if is_token_major(q) else (0, 1, 2, 3), dtype=q.dtype, device=q.device)


def laid_out_as(q: Tensor, result: Tensor) -> Tensor:
    """``result`` in the layout of :func:`empty_heads`."""
    if is_token_major(q):
        return result.transpose(1, 2).contiguous().transpose(1, 2)
    return result.contiguous()
