"""The residual block of diffusion U-Nets and their VAEs as one op: two convolutions, two norms and the shortcut."""

from typing import Any

from torch import Tensor

from fastsd_kernels.checks import (
    check_channel_bias,
    check_dtype,
    check_eps,
    check_groups,
    check_kind,
    check_map,
    check_skip,
    check_vector,
)
from fastsd_kernels.conv2d import measured
from fastsd_kernels.dispatch import Op
from fastsd_kernels.gradient import gradient_of
from fastsd_kernels.layout import empty_map, is_channels_last
from fastsd_kernels.resnet_block.reference import resnet_block as definition

_SCHEMA = """(
    Tensor x, Tensor? conv1_weight, Tensor? conv2_weight, Tensor? conv1_bias=None, Tensor? conv2_bias=None,
    Tensor? skip=None, int num_groups=32, Tensor? norm1_weight=None, Tensor? norm1_bias=None,
    int? num_groups_out=None, Tensor? norm2_weight=None, Tensor? norm2_bias=None, float eps=1e-05,
    Tensor? channel_bias=None, Tensor? shortcut_weight=None, Tensor? shortcut_bias=None, float output_scale=1.0,
    str? backend=None
) -> Tensor"""


def resnet_block(
    x: Tensor,
    conv1_weight: Tensor | None,
    conv2_weight: Tensor | None,
    conv1_bias: Tensor | None = None,
    conv2_bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    num_groups: int = 32,
    norm1_weight: Tensor | None = None,
    norm1_bias: Tensor | None = None,
    num_groups_out: int | None = None,
    norm2_weight: Tensor | None = None,
    norm2_bias: Tensor | None = None,
    eps: float = 1e-5,
    channel_bias: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
    output_scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""Add to a map what two convolutions make of it, each behind GroupNorm and SiLU.

    .. math::
        z = \mathrm{cat}(x, \mathrm{skip}), \qquad
        h = W_1 * \mathrm{silu}(\mathrm{norm}_1(z)) + b_1 + \mathrm{channel\_bias}, \qquad
        y = \big(\mathrm{shortcut}(z) + W_2 * \mathrm{silu}(\mathrm{norm}_2(h)) + b_2\big) \, s

    Both convolutions are 3×3 of stride 1 with one pixel of zeros around, the shortcut is 1×1, or the identity. A block
    that pruning has reduced to its shortcut has no ``conv1_weight`` and no ``conv2_weight``: y = shortcut(z)·s.

    Args:
        x: ``[B, C1, H, W]``, float16, bfloat16, float32 or float64; any strides.
        conv1_weight: ``[K, C, 3, 3]`` with C = C1 + C2, ``x``'s dtype; ``None`` for a shortcut alone.
        conv2_weight: ``[K, K, 3, 3]``, ``x``'s dtype; ``None`` where ``conv1_weight`` is.
        conv1_bias, conv2_bias: ``[K]``, any floating-point dtype; ``None`` for 0.
        skip: ``[B, C2, H, W]``, ``x``'s dtype; read behind ``x`` in place of a concatenation.
        num_groups: of the first norm; must divide C.
        norm1_weight, norm1_bias: ``[C]``, any floating-point dtype; ``None`` for 1 and 0.
        num_groups_out: of the second norm; must divide K. ``None`` for ``num_groups``.
        norm2_weight, norm2_bias: ``[K]``, or ``[B, K]`` where the time embedding scales and shifts.
        eps: added to the variance, by both norms.
        channel_bias: ``[B, K]`` or ``[1, K]``, any floating-point dtype: the time embedding.
        shortcut_weight: ``[K, C, 1, 1]``, ``x``'s dtype; ``None`` for the identity, which needs K = C.
        shortcut_bias: ``[K]``, any floating-point dtype; only with ``shortcut_weight``.
        output_scale: s, multiplies the sum.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; ``None`` takes the fastest that serves.

    Returns:
        ``[B, K, H, W]`` in ``x``'s dtype, dense; channels last if ``x``'s channels are innermost, else contiguous.
        Under autocast in its dtype; the norms then see maps in that dtype too.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; the message names it.
        BackendUnavailable: ``backend`` cannot run here or cannot serve these arguments; the message says why.

    Differentiable, twice, in every tensor argument. Sources: He et al., "Deep Residual Learning", 2015, in the form of
    diffusers' ``ResnetBlock2D`` (Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", 2020).
    """
    return op(
        x,
        conv1_weight,
        conv2_weight,
        conv1_bias,
        conv2_bias,
        skip,
        num_groups,
        norm1_weight,
        norm1_bias,
        num_groups_out,
        norm2_weight,
        norm2_bias,
        eps,
        channel_bias,
        shortcut_weight,
        shortcut_bias,
        output_scale,
        backend,
    )


def _check(
    x: Tensor,
    conv1_weight: Tensor | None,
    conv2_weight: Tensor | None,
    conv1_bias: Tensor | None,
    conv2_bias: Tensor | None,
    skip: Tensor | None,
    num_groups: int,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    num_groups_out: int | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    eps: float,
    channel_bias: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    output_scale: float,
) -> None:
    check_map(x)
    batch, channels = x.shape[0], check_skip(x, skip)
    if (conv1_weight is None) != (conv2_weight is None):
        raise ValueError("conv1_weight, conv2_weight: expected both or none; got one of them")
    if shortcut_weight is not None:
        _check_weight("shortcut_weight", shortcut_weight, None, channels, 1)
        out_channels = shortcut_weight.shape[0]
        check_vector("shortcut_bias", shortcut_bias, out_channels)
    elif shortcut_bias is not None:
        raise ValueError(
            f"shortcut_bias: expected None without shortcut_weight; got shape {tuple(shortcut_bias.shape)}"
        )
    else:
        out_channels = channels
    if conv1_weight is None or conv2_weight is None:
        of_convolutions = {
            "conv1_bias": conv1_bias,
            "conv2_bias": conv2_bias,
            "norm1_weight": norm1_weight,
            "norm1_bias": norm1_bias,
            "norm2_weight": norm2_weight,
            "norm2_bias": norm2_bias,
            "channel_bias": channel_bias,
        }
        for name, tensor in of_convolutions.items():
            if tensor is not None:
                raise ValueError(f"{name}: expected None without convolutions; got shape {tuple(tensor.shape)}")
    else:
        _check_weight("conv1_weight", conv1_weight, out_channels, channels, 3)
        _check_weight("conv2_weight", conv2_weight, out_channels, out_channels, 3)
        check_groups("num_groups", num_groups, channels)
        if num_groups_out is None:
            check_groups("num_groups", num_groups, out_channels)
        else:
            check_groups("num_groups_out", num_groups_out, out_channels)
        check_vector("conv1_bias", conv1_bias, out_channels)
        check_vector("conv2_bias", conv2_bias, out_channels)
        check_vector("norm1_weight", norm1_weight, channels)
        check_vector("norm1_bias", norm1_bias, channels)
        check_vector("norm2_weight", norm2_weight, out_channels, batch)
        check_vector("norm2_bias", norm2_bias, out_channels, batch)
        check_channel_bias(channel_bias, batch, out_channels)
    check_eps(eps)
    weights = {"conv1_weight": conv1_weight, "conv2_weight": conv2_weight, "shortcut_weight": shortcut_weight}
    check_kind(
        x=x,
        skip=skip,
        **weights,
        conv1_bias=conv1_bias,
        conv2_bias=conv2_bias,
        norm1_weight=norm1_weight,
        norm1_bias=norm1_bias,
        norm2_weight=norm2_weight,
        norm2_bias=norm2_bias,
        channel_bias=channel_bias,
        shortcut_bias=shortcut_bias,
    )
    check_dtype(x=x, skip=skip, **weights)


def _check_weight(name: str, weight: Tensor, out_channels: int | None, channels: int, kernel: int) -> None:
    """``out_channels``: ``None`` for any number from 1 on."""
    expected = (weight.shape[0] if out_channels is None and weight.dim() else out_channels, channels, kernel, kernel)
    if weight.shape != expected or weight.numel() == 0:
        out = "at least 1" if out_channels is None else out_channels
        raise ValueError(
            f"{name}: expected shape ({out}, {channels}, {kernel}, {kernel}); got shape {tuple(weight.shape)}"
        )


def _fake(x: Tensor, *args: Any) -> Tensor:
    skip, shortcut_weight = args[4], args[13]
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    return empty_map(x, channels if shortcut_weight is None else shortcut_weight.shape[0], is_channels_last(x))


def _prefer(x: Tensor, conv1_weight: Tensor | None, conv2_weight: Tensor | None, *args: Any) -> str | None:
    backends = set(map(measured.backend, measured.fastest_of_block(x, conv1_weight, conv2_weight, args[11])))
    return backends.pop() if len(backends) == 1 else None


def _flops(y: Tensor, x: Tensor, conv1_weight: Tensor | None, conv2_weight: Tensor | None, *args: Any) -> int:
    batch, _, height, width = x.shape
    weights = (conv1_weight, conv2_weight, args[11])  # the last is the shortcut's
    return 2 * batch * height * width * sum(weight.numel() for weight in weights if weight is not None)


_setup_context, _backward = gradient_of(definition)

op = Op(
    "resnet_block",
    _SCHEMA,
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast={"cpu": None, "cuda": None},
    prefer=_prefer,
    flops=_flops,
)
