"""Full attention of all heads, as the definition has it and never as a matrix of scores in memory."""

import math
from typing import Any

from torch import Tensor

from fastsd_kernels.attention.reference import widened
from fastsd_kernels.checks import check_dtype, check_kind
from fastsd_kernels.dispatch import Op
from fastsd_kernels.gradient import gradient_of
from fastsd_kernels.heads import empty_heads

_SCHEMA = """(
    Tensor q, Tensor k, Tensor v, Tensor? bias=None, float? scale=None, str? backend=None
) -> Tensor"""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Softmax attention.

    .. math::
        o_i = \mathrm{softmax}\big(s\,q_i K^\top + \mathrm{bias}\big) V

    Args:
        q: ``[B, heads, N, d]``, float16, bfloat16, float32 or float64; any strides, so that what a projection gives,
            ``x.unflatten(-1, (heads, d)).transpose(1, 2)``, is read where it is, also out of one packed tensor.
        k, v: ``[B, heads, M, d]``, ``q``'s dtype, M at least 1; any strides.
        bias: ``[B, M]`` or ``[1, M]``, any floating-point dtype, added to the scores of all queries; -inf leaves a key
            out. A query all of whose keys are left out gets NaN.
        scale: s; ``None`` for 1/√d.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; ``None`` takes the fastest that serves.

    Returns:
        ``[B, heads, N, d]`` in ``q``'s dtype, dense. Where the heads of a token of ``q`` lie side by side, so do the
        result's: ``transpose(1, 2).flatten(2)`` then copies nothing. Under autocast in its dtype.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; the message names it.
        BackendUnavailable: ``backend`` cannot run here or cannot serve these arguments; the message says why.

    Differentiable, twice, in q, k, v and bias. Source: Vaswani et al., "Attention Is All You Need", 2017; computed
    block by block as in Dao et al., "FlashAttention", 2022.
    """
    return op(q, k, v, bias, scale, backend)


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> None:
    if q.dim() != 4 or q.shape[3] == 0:
        raise ValueError(f"q: expected [batch, heads, tokens, width], a width of at least 1; got {tuple(q.shape)}")
    batch, heads, _, width = q.shape
    if k.dim() != 4 or k.shape[2] == 0 or (*k.shape[:2], k.shape[3]) != (batch, heads, width):
        raise ValueError(f"k: expected shape ({batch}, {heads}, keys, {width}), at least one key; got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected k's shape {tuple(k.shape)}; got {tuple(v.shape)}")
    if bias is not None and (bias.dim() != 2 or bias.shape[0] not in (1, batch) or bias.shape[1] != k.shape[2]):
        raise ValueError(f"bias: expected shape ({batch}, {k.shape[2]}) or (1, {k.shape[2]}); got {tuple(bias.shape)}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number; got {scale}")
    check_kind(q=q, k=k, v=v, bias=bias)
    check_dtype(q=q, k=k, v=v)


def _fake(q: Tensor, *args: Any) -> Tensor:
    return empty_heads(q)


def _flops(y: Tensor, q: Tensor, k: Tensor, *args: Any) -> int:
    return 4 * q.numel() * k.shape[2]


_setup_context, _backward = gradient_of(widened)

op = Op(
    "attention",
    _SCHEMA,
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast={"cpu": None, "cuda": None},
    flops=_flops,
)
