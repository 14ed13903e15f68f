"""A convolution with what surrounds it in a block: as one op where it is plain, else part by part."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsd.nn.cond_conv import CondConv2d
from fastsd.nn.plain import remember, why_not_plain
from fastsd.nn.replacement import settings_of
from fastsd_kernels import cond_conv2d, conv2d, group_norm_silu
from fastsd_kernels.checks import DTYPES
from fastsd_kernels.conv2d import measured
from fastsd_kernels.conv2d.reference import epilogue

_DEVICES = ("cpu", "cuda")
_STOCK_FORWARD = nn.Conv2d._conv_forward
remember(CondConv2d)


def convolve(
    owner: nn.Module,
    name: str,
    x: Tensor,
    *,
    input_bias: Tensor | None = None,
    norm: nn.GroupNorm | None = None,
    scale_shift: tuple[Tensor, Tensor] | None = None,
    activation: str = "none",
    upsample_size: Sequence[int] | None = None,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale: float = 1.0,
) -> Tensor:
    """A convolution, ``owner.<name>``, and what surrounds it in a block; every part may be left out.

    ``(conv(pad(nearest(act(norm(x + input_bias) · (1 + scale) + shift)))) + channel_bias + residual) · output_scale``

    Args:
        owner: the replaced module that holds the convolution.
        name: its attribute.
        x: ``[B, C, H, W]``.
        input_bias: ``[B, C, 1, 1]``, or what else broadcasts to ``x``; only with a norm.
        norm: a plain one, or ``None``.
        scale_shift: ``[B, C, 1, 1]`` both, or what else broadcasts to ``x``; only with a norm.
        activation: ``"silu"`` or ``"none"``.
        upsample_size: height and width that the map is enlarged to.
        padding: left, right, top, bottom, besides the convolution's own.
        channel_bias: ``[B, C', 1, 1]``, or what else broadcasts to the result.
        residual: ``[B, C', H', W']``.

    Returns:
        ``[B, C', H', W']``, the same to rounding whether in one op or in several.
    """
    settings, conv = settings_of(owner), getattr(owner, name)
    backend = None if settings is None else settings.backend
    parameters = norm_parameters(x, norm, scale_shift)
    others = (channel_bias, residual, *(parameters or {}).values())
    mixes = upsample_size is None and is_mixture(owner, name, x, *others)
    if (
        settings is None
        or parameters is None
        or not (mixes or is_fused(owner, name, x, *others, padding=padding, upsample_size=upsample_size))
    ):
        z = x if norm is None else normalise(owner, x, norm, input_bias, scale_shift, activation)
        z = F.silu(z) if norm is None and activation == "silu" else z
        z = z if upsample_size is None else F.interpolate(z, size=tuple(upsample_size), mode="nearest")
        y = conv(F.pad(z, padding) if any(padding) else z)
        y = y if channel_bias is None else y + channel_bias
        return epilogue(y, None, residual, output_scale)

    x = x if input_bias is None else x + input_bias
    row = None if channel_bias is None else row_of(channel_bias, x, conv.out_channels)
    # what does not fit the op broadcasts or promotes as a sum does
    fits = (channel_bias is None or row is not None) and (
        residual is None or (residual.dtype == x.dtype and residual.shape[0] == x.shape[0])
    )
    surroundings: dict[str, Any] = {
        **parameters,
        "activation": activation,
        "channel_bias": row if fits else None,
        "residual": residual if fits else None,
        "output_scale": output_scale if fits else 1.0,
        "backend": backend,
    }
    surroundings |= {"stride": conv.stride[0], "padding": _whole_padding(conv, padding)}
    if mixes:
        y = cond_conv2d(x, **conv.mixture(), **surroundings)
    else:
        y = conv2d(x, conv.weight, conv.bias, upsample_size=upsample_size, **surroundings)
    if fits:
        return y
    return epilogue(y if channel_bias is None else y + channel_bias, None, residual, output_scale)


def is_fused(
    owner: nn.Module,
    name: str,
    x: Tensor,
    *others: Any,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    upsample_size: Sequence[int] | None = None,
) -> bool:
    """Whether ``owner.<name>`` on ``x`` is a convolution that the op computes, and nobody asked for anything else.

    ``others``: what else goes into it. The rest as for :func:`convolve`.

    With a gradient wanted it is not: the op keeps less for the backward pass than torch, and computes more in it.
    """
    conv = getattr(owner, name)
    return (
        is_op_convolution(owner, name)
        and x.dim() == 4
        and x.shape[1] == conv.in_channels
        and x.shape[2] > 0
        and x.shape[3] > 0
        and is_inference(conv, x, *others)
        and is_chosen(x, conv, padding, upsample_size)
    )


def is_one_op(owner: nn.Module, name: str, x: Tensor) -> bool:
    """Whether ``owner.<name>`` on ``x`` is one op with what surrounds it, whichever."""
    return is_fused(owner, name, x) or is_mixture(owner, name, x)


def is_mixture(owner: nn.Module, name: str, x: Tensor, *others: Any) -> bool:
    """Whether ``owner.<name>`` on ``x`` is a convolution that mixes kernels, which the op computes.

    ``others``: what else goes into it. As :func:`is_fused`, not where a gradient is wanted.
    """
    conv = getattr(owner, name)
    return (
        isinstance(conv, CondConv2d)
        and why_not_plain(owner, name, CondConv2d) is None
        and why_not_plain(conv, "routing", nn.Linear) is None
        and x.dim() == 4
        and x.shape[1] == conv.in_channels
        and x.shape[2:].numel() > 0
        and is_inference(conv, x, conv.routing.weight, conv.routing.bias, *others)
    )


def is_chosen(
    x: Tensor,
    conv: nn.Conv2d,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    upsample_size: Sequence[int] | None = None,
) -> bool:
    """Whether the op is to compute a convolution that it knows, rather than torch.

    On a CPU it is, and chooses its algorithm by itself. On a GPU it is where it was measured to be faster: see
    :mod:`fastsd_kernels.conv2d.measured`. A compiler cannot look that up.
    """
    if x.device.type == "cpu":
        return True
    if torch.compiler.is_compiling():
        return False
    fastest = measured.fastest(x, conv.weight, conv.stride[0], _whole_padding(conv, padding), upsample_size)
    return fastest not in (None, measured.DIRECT)


def is_op_convolution(owner: nn.Module, name: str) -> bool:
    """Whether ``owner.<name>`` is a convolution that the op knows, and may be read through."""
    conv = getattr(owner, name)
    return (
        why_not_plain(owner, name, nn.Conv2d) is None
        # what seamless tiling and the like override
        and "_conv_forward" not in conv.__dict__
        and nn.Conv2d._conv_forward is _STOCK_FORWARD
        and conv.kernel_size in ((1, 1), (3, 3))
        and conv.stride in ((1, 1), (2, 2))
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
    )


def is_inference(conv: nn.Conv2d | nn.Linear | CondConv2d, x: Tensor, *others: Any) -> bool:
    """Whether a convolution or projection of ``x`` may run as the op: in one dtype, no gradient wanted.

    ``others``: what else goes into it.
    """
    return (
        x.device == conv.weight.device
        and x.device.type in _DEVICES
        and x.dtype == conv.weight.dtype
        and x.dtype in DTYPES
        and (conv.bias is None or conv.bias.dtype == x.dtype)
        and not torch.is_autocast_enabled(x.device.type)
        and not (torch.is_grad_enabled() and wants_gradient(x, conv.weight, conv.bias, *others))
    )


def _whole_padding(conv: nn.Conv2d | CondConv2d, padding: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """``padding`` and the convolution's own."""
    assert not isinstance(conv.padding, str)  # is_op_convolution says so
    (vertical, horizontal), (left, right, top, bottom) = conv.padding, padding
    return left + horizontal, right + horizontal, top + vertical, bottom + vertical


def wants_gradient(*values: Any) -> bool:
    """Whether something among ``values`` is a tensor that a gradient is taken to."""
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def norm_parameters(
    x: Tensor, norm: nn.GroupNorm | None, scale_shift: tuple[Tensor, Tensor] | None
) -> dict[str, Any] | None:
    """The op's arguments for the norm; ``None`` where scale and shift are not one number per sample and channel."""
    if norm is None:
        return {}
    weight: Tensor | None = norm.weight
    bias: Tensor | None = norm.bias
    if scale_shift is not None:
        scale, shift = (row_of(t, x, norm.num_channels) for t in scale_shift)
        if scale is None or shift is None:
            return None
        scale, shift = (1 + scale).expand(x.shape[0], -1), shift.expand(x.shape[0], -1)
        weight = scale if weight is None else scale * weight
        bias = shift if bias is None else scale * bias + shift
    return {"num_groups": norm.num_groups, "norm_weight": weight, "norm_bias": bias, "eps": norm.eps}


def row_of(t: Tensor, x: Tensor, channels: int) -> Tensor | None:
    """``[B or 1, C]`` of ``t [B or 1, C, 1, 1]``, ``None`` for anything else, which only a sum broadcasts."""
    if t.dtype == x.dtype and t.dim() == 4 and t.shape[1:] == (channels, 1, 1) and t.shape[0] in (1, x.shape[0]):
        return t.flatten(1)
    return None


def normalise(
    owner: nn.Module,
    x: Tensor,
    norm: nn.GroupNorm,
    input_bias: Tensor | None = None,
    scale_shift: tuple[Tensor, Tensor] | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(norm(x + input_bias) · (1 + scale) + shift)``, with the arguments of :func:`convolve`."""
    settings = settings_of(owner)
    row = None if input_bias is None else row_of(input_bias, x, norm.num_channels)
    if input_bias is not None and row is None:
        x = x + input_bias
    z = group_norm_silu(
        x,
        norm.num_groups,
        norm.weight,
        norm.bias,
        norm.eps,
        activation if scale_shift is None else "none",
        channel_bias=row,
        backend=None if settings is None else settings.backend,
    )
    if scale_shift is None:
        return z
    z = z * (1 + scale_shift[0]) + scale_shift[1]
    return F.silu(z) if activation == "silu" else z


def example_convolution(
    owner: nn.Module,
    name: str,
    x: Tensor,
    num_groups: int = 0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> dict[str, tuple[Any, ...]]:
    """For :func:`fastsd.patching.rule.Rule.op_calls`: the call that :func:`convolve` makes, if it makes one."""
    conv = getattr(owner, name)
    with torch.no_grad():
        mixes = is_mixture(owner, name, x)
        if not mixes and not is_fused(owner, name, x):
            return {}
    padding = [conv.kernel_size[0] // 2] * 4
    if mixes:
        mixture = (x, *conv.mixture().values(), conv.stride[0], padding, None)
        return {"cond_conv2d": (*mixture, num_groups, weight, bias, eps, activation, None, None, 1.0, None)}
    norm = (num_groups, weight, bias, eps, None, None, activation)
    return {"conv2d": (x, conv.weight, conv.bias, conv.stride[0], padding, None, *norm, None, None, None, 1.0, None)}
