"""Tokens in heads, ``[B, heads, N, d]``: where they lie."""

from torch import Tensor


def is_token_major(x: Tensor) -> bool:
    """Whether ``x [B, heads, N, d]`` keeps the heads of a token side by side, as a projection gives them."""
    return x.shape[1] > 1 and x.stride(1) < x.stride(2)


def empty_heads(q: Tensor) -> Tensor:
    """The uninitialised result ``[B, heads, N, d]``, dense, with the heads where ``q`` has them."""
    batch, heads, tokens, width = q.shape
    if is_token_major(q):
        return q.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    return q.new_empty(q.shape)


def laid_out_as(q: Tensor, result: Tensor) -> Tensor:
    """``result`` in the layout of :func:`empty_heads`."""
    if is_token_major(q):
        return result.transpose(1, 2).contiguous().transpose(1, 2)
    return result.contiguous()
