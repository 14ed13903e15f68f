"""GroupNorm then SiLU in one op, with the residual block's time embedding and skip connection read on the way."""

from typing import Any

import torch
from torch import Tensor

from fastsd_kernels.checks import (
    check_channel_bias,
    check_dtype,
    check_eps,
    check_groups,
    check_kind,
    check_skip,
    check_vector,
)
from fastsd_kernels.dispatch import Op
from fastsd_kernels.group_norm_silu.reference import group_norm_silu_backward
from fastsd_kernels.layout import empty_map, is_channels_last

ACTIVATIONS = ("silu", "none")
_SCHEMA = """(
    Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, str activation="silu",
    Tensor? channel_bias=None, Tensor? skip=None, str? backend=None
) -> Tensor"""


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    *,
    channel_bias: Tensor | None = None,
    skip: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Normalise over groups of channels, then activate.

    .. math::
        z = \mathrm{cat}(x, \mathrm{skip}) + \mathrm{channel\_bias}, \qquad
        u = \frac{z - \mathrm{mean}_g(z)}{\sqrt{\mathrm{var}_g(z) + \mathrm{eps}}} \, w + b, \qquad
        y = u\,\sigma(u)

    The mean and the biased variance run over the C/num_groups channels and all positions of a group of one
    sample. Neither the concatenation nor the sum is materialised. Statistics and arithmetic are in float32
    (float64 for float64 input); the variance does not cancel for a large mean.

    Args:
        x: ``[B, C1, *spatial]``, float16, bfloat16, float32 or float64; any strides.
        num_groups: must divide C = C1 + C2.
        weight, bias: ``[C]``, any floating-point dtype; ``None`` for 1 and 0.
        eps: added to the variance.
        activation: ``"silu"`` or ``"none"`` (then y = u).
        channel_bias: ``[B, C]`` or ``[1, C]``, added to the input of the norm, as a U-Net's time embedding is.
        skip: ``[B, C2, *spatial]``, ``x``'s dtype; read behind ``x`` in place of a concatenation.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; ``None`` takes the fastest that serves.

    Returns:
        ``[B, C, *spatial]`` in ``x``'s dtype, dense; channels last if ``x``'s channels are innermost, else
        contiguous. Under CUDA autocast float32, as ``torch.nn.functional.group_norm``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; the message names it.
        BackendUnavailable: ``backend`` cannot run here or cannot serve these arguments; the message says why.

    Differentiable, twice, in every tensor argument. Source: Wu and He, "Group Normalization", 2018 (eps inside
    the root, biased variance); SiLU is Hendrycks and Gimpel, 2016.
    """
    return op(x, num_groups, weight, bias, eps, activation, channel_bias, skip, backend)


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    channel_bias: Tensor | None,
    skip: Tensor | None,
) -> None:
    if x.dim() < 2:
        raise ValueError(f"x: expected [batch, channels, *spatial]; got shape {tuple(x.shape)}")
    channels = check_skip(x, skip)
    check_groups("num_groups", num_groups, channels)
    check_vector("weight", weight, channels)
    check_vector("bias", bias, channels)
    check_channel_bias(channel_bias, x.shape[0], channels)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    check_eps(eps)
    check_kind(x=x, weight=weight, bias=bias, channel_bias=channel_bias, skip=skip)
    check_dtype(x=x, skip=skip)


def _fake(x: Tensor, *args: Any) -> Tensor:
    skip = args[-1]
    return empty_map(x, x.shape[1] + (0 if skip is None else skip.shape[1]), is_channels_last(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.num_groups, weight, bias, ctx.eps, ctx.activation, channel_bias, skip = inputs
    ctx.save_for_backward(x, weight, bias, channel_bias, skip)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, channel_bias, skip = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_channel_bias, grad_skip = group_norm_silu_backward(
        grad, x, ctx.num_groups, weight, bias, ctx.eps, ctx.activation, channel_bias, skip
    )
    return grad_x, None, grad_weight, grad_bias, None, None, grad_channel_bias, grad_skip


op = Op(
    "group_norm_silu",
    _SCHEMA,
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast={"cuda": torch.float32},
)
