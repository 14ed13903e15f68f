"""resnet_block in Triton: conv2d's launches, the first convolution taking the statistics of the second norm.

Each program of that convolution leaves the moments of its tile while it has the tile in registers, so that no launch
reads the map between the convolutions for its statistics alone. That map is channels last whatever the layout of x.

Copies beside conv2d's: the concatenation, where the identity adds it to the result. An identity alone is torch's
product with the scale, without a launch of ours.
"""

from typing import Any

import torch
from torch import Tensor

from fastsd_kernels import triton_runtime
from fastsd_kernels.conv2d import triton_impl as conv2d
from fastsd_kernels.layout import dense, empty_map, is_channels_last
from fastsd_kernels.triton_runtime import Launch, ceil_div, ceil_power_of_2, contiguous, row_stride, unavailable

if triton_runtime.triton is not None:
    from fastsd_kernels.resnet_block import triton_kernels as kernels

__all__ = ["launches", "reject", "run", "unavailable"]

SAME, NONE = (1, 1, 1, 1), (0, 0, 0, 0)
# Moments that are merged, and channels whose coefficients are stored, in one step; not measured on a card
MOST_MERGED, MOST_CHANNELS, MERGE_WARPS = 1024, 1024, 4


def launches(
    x: Tensor,  # [B, C1, H, W]
    conv1_weight: Tensor | None,  # [K, C, 3, 3], C = C1 + C2
    conv2_weight: Tensor | None,  # [K, K, 3, 3]
    conv1_bias: Tensor | None,  # [K]
    conv2_bias: Tensor | None,  # [K]
    skip: Tensor | None,  # [B, C2, H, W]
    num_groups: int,
    norm1_weight: Tensor | None,  # [C]
    norm1_bias: Tensor | None,  # [C]
    num_groups_out: int | None,
    norm2_weight: Tensor | None,  # [K] or [B, K]
    norm2_bias: Tensor | None,  # [K] or [B, K]
    eps: float,
    channel_bias: Tensor | None,  # [B, K] or [1, K]
    shortcut_weight: Tensor | None,  # [K, C, 1, 1]
    shortcut_bias: Tensor | None,  # [K]
    output_scale: float,
) -> tuple[Tensor, tuple[Launch, ...]]:
    """The result, uninitialised, and the launches that fill it in order. Tensors may be on ``meta``.

    An identity alone needs no launch: its result is there already.
    """
    channels_last, is_shortcut = is_channels_last(x), conv1_weight is None or conv2_weight is None
    if shortcut_weight is None:
        # a sum with the block's input needs that input
        x, skip = dense(x if skip is None else torch.cat([x, skip], dim=1), channels_last), None
        if is_shortcut:
            return x * output_scale, ()
    out_channels = x.shape[1] if shortcut_weight is None else shortcut_weight.shape[0]
    y = empty_map(x, out_channels, channels_last)
    if y.numel() == 0:
        return y, ()

    shortcut, steps = x, list[Launch]()
    x, skip = conv2d.sources(x, skip)
    if shortcut_weight is not None:
        shortcut, scale = (y, output_scale) if is_shortcut else (torch.empty_like(y), 1.0)
        bare = (None, "none", None, None, None)
        steps, _ = conv2d.convolution(x, skip, shortcut_weight, shortcut_bias, 1, NONE, *bare, scale, shortcut)
    if conv1_weight is None or conv2_weight is None:
        return y, tuple(steps)

    norm1, norm = conv2d.norm_coefficients(x, skip, num_groups, norm1_weight, norm1_bias, eps, None, None)
    h = empty_map(x, out_channels, True)
    after_norm1 = (norm1, "silu", None, channel_bias, None, 1.0)
    first, moments = conv2d.convolution(x, skip, conv1_weight, conv1_bias, 1, SAME, *after_norm1, h, with_moments=True)
    groups = num_groups if num_groups_out is None else num_groups_out
    norm2, merge = _norm_coefficients(h, moments, groups, norm2_weight, norm2_bias, eps)
    after_norm2 = (norm2, "silu", None, None, shortcut, output_scale)
    second, _ = conv2d.convolution(h, None, conv2_weight, conv2_bias, 1, SAME, *after_norm2, y)
    return y, (*steps, *norm, *first, merge, *second)


def _norm_coefficients(
    h: Tensor,  # [B, K, H, W]
    moments: conv2d.Moments,
    num_groups: int,
    weight: Tensor | None,  # [K] or [B, K]
    bias: Tensor | None,  # [K] or [B, K]
    eps: float,
) -> tuple[Tensor, Launch]:
    """Center, scale and offset ``[B, 3, K]`` of each channel, uninitialised, and the launch that fills them."""
    batch, channels, height, width = h.shape
    group_channels, tiles = channels // num_groups, ceil_div(height * width, moments.tile_positions)
    coefficients = h.new_empty((batch, 3, channels), dtype=torch.float32)
    weight, bias = contiguous(weight), contiguous(bias)
    args = (
        *(moments.parts, weight, bias, coefficients, eps),
        *(channels, height * width, tiles, row_stride(weight), row_stride(bias)),
        *(moments.tile_positions, group_channels),
        min(ceil_power_of_2(group_channels), MOST_CHANNELS),
        min(ceil_power_of_2(tiles * group_channels), MOST_MERGED),
    )
    return coefficients, Launch(kernels.moment_coefficients, (batch * num_groups,), args, MERGE_WARPS)


def reject(
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
) -> str | None:
    return triton_runtime.reject(
        x,
        conv1_bias=conv1_bias,
        conv2_bias=conv2_bias,
        norm1_weight=norm1_weight,
        norm1_bias=norm1_bias,
        norm2_weight=norm2_weight,
        norm2_bias=norm2_bias,
        channel_bias=channel_bias,
        shortcut_bias=shortcut_bias,
    )


def run(x: Tensor, *args: Any) -> Tensor:
    y, steps = launches(x, *args)
    triton_runtime.run(x, steps)
    return y
