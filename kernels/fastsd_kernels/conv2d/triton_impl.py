"""conv2d in Triton, ``algorithm="implicit_gemm"``: up to four launches, without atomics.

Statistics and coefficients of the norm, the convolution, and the sum of its splits where it is split. Neither the
concatenation, nor the normalised map, nor the enlarged one exists in memory; the price is that norm and activation are
computed anew for each tap and each tile of output channels.

Copies that are made where the layout is another: of x and skip to channels last, of a 3×3 weight to channels last (a
model in ``torch.channels_last`` has all three already), and of the residual to the result's layout.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsd_kernels import triton_runtime
from fastsd_kernels.conv2d import measured
from fastsd_kernels.conv2d.triton_tiles import TILES, Tile
from fastsd_kernels.group_norm_silu import triton_impl as norm
from fastsd_kernels.layout import dense, empty_map, is_channels_last, output_size
from fastsd_kernels.triton_runtime import Launch, ceil_div, contiguous, row_stride, unavailable

if triton_runtime.triton is not None:
    from fastsd_kernels.conv2d import triton_kernels as kernels

__all__ = [
    "Moments",
    "convolution",
    "launches",
    "norm_coefficients",
    "plan",
    "reject",
    "run",
    "sources",
    "unavailable",
]

ALGORITHM = "implicit_gemm"

# Nothing here was measured on a card: where `measured` has no tile, the choice is a guess that fits the registers (see
# the gates)
# Most positions and output channels of a tile, and input channels of a step
MOST_M, MOST_N, MOST_K = 128, 128, 32
# Steps under way at once: one is computed, the others are loaded; with experts as many as these bytes hold
STAGES, STAGES_BYTES = 4, 80 * 1024
# One program for each multiprocessor of the largest card: with fewer tiles the product is split along its depth
FEWEST_PROGRAMS = 132
# Steps of a split: fewer do not pay for the sums that it writes
FEWEST_STEPS = 16
# The tile of the sum of splits: eight elements a thread
SUM_M, SUM_N, SUM_WARPS = 32, 32, 4
# Merging statistics: at most 1024 moments at once
NORM_WARPS = 4


class Plan(NamedTuple):
    """How the product of each sample is cut; the grid has ``batch * row_tiles * column_tiles * splits`` programs."""

    tile: Tile
    row_tiles: int
    column_tiles: int
    splits: int
    steps_per_split: int


class Moments(NamedTuple):
    """Mean and sum of squared deviations from it of each channel over each tile of a map's positions."""

    parts: Tensor | None  # [B, tiles, 2, C], float32; None where nobody asked
    tile_positions: int


def tile(positions: int, out_channels: int, itemsize: int, experts: int = 0) -> Tile:
    """What to take where nobody has measured."""
    if itemsize == 4:
        # no tensor cores: more of the product in each of fewer threads
        t = Tile(64, 64 if out_channels > 16 else 16, 32, 4)
    elif out_channels <= 16:
        t = TILES["64x16"]
    elif positions <= 64:
        t = TILES["64x64"]
    else:
        # twice as wide where that adds no idle channels: fewer tiles activate the same element; but not by experts,
        # whose tiles all lie in shared memory at once
        t = TILES["128x64" if ceil_div(out_channels, 64) % 2 or experts else "128x128"]
    return Tile(min(t.block_m, MOST_M), min(t.block_n, MOST_N), min(t.block_k, MOST_K), t.num_warps)


@functools.cache
def plan(
    batch: int,
    x_channels: int,
    skip_channels: int,
    out_channels: int,
    positions: int,
    kernel: int,
    itemsize: int,
    fastest: Tile | None = None,
) -> Plan:
    """The cut for ``batch`` maps of ``positions`` each in the result; only ``skip_channels`` may be 0.

    Args:
        fastest: the tile that was measured to be.
    """
    t = fastest or tile(positions, out_channels, itemsize)
    row_tiles, column_tiles = ceil_div(positions, t.block_m), ceil_div(out_channels, t.block_n)
    steps = (ceil_div(x_channels, t.block_k) + ceil_div(skip_channels, t.block_k)) * kernel * kernel
    splits = max(min(FEWEST_PROGRAMS // (batch * row_tiles * column_tiles), steps // FEWEST_STEPS), 1)
    steps_per_split = ceil_div(steps, splits)
    return Plan(t, row_tiles, column_tiles, ceil_div(steps, steps_per_split), steps_per_split)


def launches(
    x: Tensor,  # [B, C1, H, W]
    weight: Tensor,  # [K, C, R, R], C = C1 + C2
    bias: Tensor | None,  # [K]
    stride: int,
    padding: Sequence[int],  # left, right, top, bottom
    skip: Tensor | None,  # [B, C2, H, W]
    num_groups: int,
    norm_weight: Tensor | None,  # [C] or [B, C]
    norm_bias: Tensor | None,  # [C] or [B, C]
    eps: float,
    mean: Tensor | None,  # [B, num_groups]
    rstd: Tensor | None,  # [B, num_groups]
    activation: str,
    upsample_size: Sequence[int] | None,  # height, width
    channel_bias: Tensor | None,  # [B, K] or [1, K]
    residual: Tensor | None,  # [B, K, H', W']
    output_scale: float,
    algorithm: str | None,
) -> tuple[Tensor, tuple[Launch, ...]]:
    """The result, uninitialised, and the launches that fill it in order. Tensors may be on ``meta``."""
    size = x.shape[2:] if upsample_size is None else upsample_size
    out_size = output_size(size, weight.shape[2], stride, padding)
    y = empty_map(x, weight.shape[0], is_channels_last(x), out_size)
    if y.numel() == 0:
        return y, ()

    x, skip = sources(x, skip)
    coefficients, steps = None, list[Launch]()
    if num_groups:
        coefficients, steps = norm_coefficients(x, skip, num_groups, norm_weight, norm_bias, eps, mean, rstd)
    prologue, epilogue = (coefficients, activation, upsample_size), (channel_bias, residual, output_scale)
    more, _ = convolution(x, skip, weight, bias, stride, padding, *prologue, *epilogue, y)
    return y, (*steps, *more)


def sources(x: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``x`` and ``skip`` as the kernels read them: channels last, and neither is empty if the other is not."""
    if skip is not None and (x.shape[1] == 0 or skip.shape[1] == 0):
        x, skip = (skip, None) if x.shape[1] == 0 else (x, None)
    return dense(x, True), None if skip is None else dense(skip, True)


def convolution(
    x: Tensor,  # [B, C1, H, W], from sources
    skip: Tensor | None,  # [B, C2, H, W], from sources
    weight: Tensor,  # [K, C, R, R], C = C1 + C2; or [B, K, C, R, R]; or with alpha [E, K, C, R, R]
    bias: Tensor | None,  # [K]
    stride: int,
    padding: Sequence[int],  # left, right, top, bottom
    coefficients: Tensor | None,  # [B, 3, C], of the norm
    activation: str,
    upsample_size: Sequence[int] | None,  # height, width
    channel_bias: Tensor | None,  # [B, K] or [1, K]
    residual: Tensor | None,  # [B, K, H', W']
    output_scale: float,
    y: Tensor,  # out: [B, K, H', W'], dense, not empty
    with_moments: bool = False,
    alpha: Tensor | None = None,  # [B, E] or [1, E], float32
    concat: bool = False,
) -> tuple[list[Launch], Moments]:
    """The launches that fill ``y``, and the moments, uninitialised, that they fill with it.

    Args:
        alpha: of the experts in each sample's weight; it is None for weights as they are.
        concat: whether products with the experts are added up, rather than their weights.
    """
    batch, x_channels, source_height, source_width = x.shape
    skip_channels = 0 if skip is None else skip.shape[1]
    height, width = (source_height, source_width) if upsample_size is None else upsample_size
    _, out_channels, out_height, out_width = y.shape
    kernel, channels_last = weight.shape[-1], is_channels_last(y)
    experts, weight_stride = 0 if alpha is None else weight.shape[0], None if weight.dim() == 4 else weight[0].numel()
    weight = dense(weight.flatten(0, -4), True)
    residual = None if residual is None else dense(residual, channels_last)
    bias, channel_bias = contiguous(bias), contiguous(channel_bias)

    scales = (None, None) if upsample_size is None else (source_height / height, source_width / width)
    positions, (left, _, top, _) = out_height * out_width, padding
    maps = (batch, x_channels, skip_channels, out_channels, source_height, source_width, height, width, *scales)

    fastest = measured.tile(measured.fastest(x, weight[:out_channels], stride, padding, upsample_size))
    if experts:
        fastest = tile(positions, out_channels, x.element_size(), experts)
    p = plan(batch, x_channels, skip_channels, out_channels, positions, kernel, x.element_size(), fastest)
    step_bytes = (p.tile.block_m + p.tile.block_n * experts) * p.tile.block_k * x.element_size()
    stages = max(min(STAGES, STAGES_BYTES // step_bytes), 1) if experts else STAGES
    sums, tile_positions = None, p.tile.block_m
    if p.splits > 1:
        sums, tile_positions = x.new_empty((p.splits, batch, positions, out_channels), dtype=torch.float32), SUM_M
    row_tiles, moments = ceil_div(positions, tile_positions), None
    if with_moments:
        moments = x.new_empty((batch, row_tiles, 2, out_channels), dtype=torch.float32)

    strides = (out_channels, 1) if channels_last else (1, positions)
    finish = (bias, channel_bias, residual, y, moments, row_stride(channel_bias), *strides, output_scale)
    convolve = (
        *(x, skip, weight, alpha, weight_stride, row_stride(alpha), coefficients),
        *(finish if sums is None else (None, None, None, sums, None, 0, out_channels, 1, 1.0)),
        *(*maps, out_width, positions, left, top),
        *(p.row_tiles, p.column_tiles, p.splits, p.steps_per_split),
        *(experts, concat, activation == "silu", kernel, stride),
        *(p.tile.block_m, p.tile.block_n, p.tile.block_k, stages),
    )
    programs = batch * p.row_tiles * p.column_tiles * p.splits
    steps = [Launch(kernels.convolve, (programs,), convolve, p.tile.num_warps)]
    if sums is not None:
        column_tiles = ceil_div(out_channels, SUM_N)
        cut = (row_tiles, column_tiles, p.splits, batch * positions * out_channels, SUM_M, SUM_N)
        add = (sums, *finish, out_channels, positions, *cut)
        steps.append(Launch(kernels.sum_splits, (batch * row_tiles * column_tiles,), add, SUM_WARPS))
    return steps, Moments(moments, tile_positions)


def norm_coefficients(
    x: Tensor,  # [B, C1, H, W], from sources
    skip: Tensor | None,  # [B, C2, H, W], from sources
    num_groups: int,
    weight: Tensor | None,  # [C] or [B, C], C = C1 + C2
    bias: Tensor | None,  # [C] or [B, C]
    eps: float,
    mean: Tensor | None,  # [B, num_groups]
    rstd: Tensor | None,  # [B, num_groups]
) -> tuple[Tensor, list[Launch]]:
    """Center, scale and offset ``[B, 3, C]`` of each channel, uninitialised, and the launches that fill them."""
    batch, channels = x.shape[0], x.shape[1] + (0 if skip is None else skip.shape[1])
    p, parts, moments = norm.statistics(x, skip, num_groups, None, True)
    mean, rstd, weight, bias = map(contiguous, (mean, rstd, weight, bias))
    coefficients = x.new_empty((batch, 3, channels), dtype=torch.float32)
    args = (
        *(parts if mean is None else None, mean, rstd, weight, bias, coefficients, eps),
        *(channels, x.shape[2] * x.shape[3], row_stride(weight), row_stride(bias)),
        *(p.channel_tiles, p.splits, p.tiles_per_split),
        *(channels // num_groups, p.groups_per_tile, p.tiles_per_group, p.block_c, p.block_s, p.block_g, p.block_p),
    )
    merge = Launch(kernels.norm_coefficients, (batch * p.channel_tiles,), args, NORM_WARPS)
    return coefficients, [moments, merge] if mean is None else [merge]


def reject(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    skip: Tensor | None,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor | None,
    activation: str,
    upsample_size: Sequence[int] | None,
    channel_bias: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    algorithm: str | None,
) -> str | None:
    if algorithm not in (None, ALGORITHM):
        return f"the Triton backend knows algorithm={ALGORITHM!r} alone; got {algorithm!r}; leave it out"
    return triton_runtime.reject(
        x,
        bias=bias,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        mean=mean,
        rstd=rstd,
        channel_bias=channel_bias,
    )


def run(x: Tensor, *args: Any) -> Tensor:
    y, steps = launches(x, *args)
    triton_runtime.run(x, steps)
    return y
