"""group_norm_silu in Triton: two launches, without atomics, for either layout."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsd_kernels import triton_runtime
from fastsd_kernels.layout import dense, empty_map, is_channels_last
from fastsd_kernels.triton_runtime import Launch, ceil_div, ceil_power_of_2, contiguous, row_stride, unavailable

if triton_runtime.triton is not None:
    from fastsd_kernels.group_norm_silu import triton_kernels as kernels

__all__ = ["launches", "plan", "reject", "run", "statistics", "unavailable"]

# One program for each multiprocessor of the largest card; beyond four, a program walks over several tiles
FEWEST_PROGRAMS, MOST_PROGRAMS = 132, 528
# Lanes of a tile, 32 a thread: eight warps ask for 16 KiB of float16 at once
FEWEST_LANES, MOST_LANES, LANES_PER_WARP = 1024, 8192, 1024
# Channels of a tile: neighbours in memory in channels_last maps, rows apart in contiguous ones
MOST_CHANNELS_LAST, MOST_CHANNELS_FIRST = 128, 64
# Positions of a tile of contiguous maps: 128 bytes of float16
FEWEST_POSITIONS_FIRST = 64
# Every program merges the parts of its groups anew: few groups a tile keep that small
MOST_GROUPS = 16
# Parts times groups that are merged in one step
MOST_MERGED = 1024


class Plan(NamedTuple):
    """How the maps are cut; both launches use the same grid of ``batch * splits * channel_tiles`` programs."""

    groups_per_tile: int
    tiles_per_group: int
    channel_tiles: int
    splits: int
    tiles_per_split: int
    block_c: int
    block_s: int
    block_g: int
    block_p: int
    num_warps: int


@functools.cache
def plan(batch: int, channels: int, groups: int, space: int, channels_last: bool, itemsize: int) -> Plan:
    """The tiles for maps ``[batch, channels, space]`` of ``itemsize`` bytes an element; none of the sizes is 0."""
    group_channels = channels // groups
    groups_per_tile, tiles_per_group, block_c = _channel_tile(group_channels, groups, channels_last, itemsize)
    channel_tiles = ceil_div(groups, groups_per_tile) * tiles_per_group

    lanes_a_program = batch * channel_tiles * block_c * space // FEWEST_PROGRAMS
    lanes = min(max(_floor_power_of_2(lanes_a_program), FEWEST_LANES), MOST_LANES)
    block_s = max(lanes // block_c, 1 if channels_last else FEWEST_POSITIONS_FIRST)
    block_s = min(block_s, ceil_power_of_2(space))

    tiles = ceil_div(space, block_s)
    splits = min(tiles, max(MOST_PROGRAMS // (batch * channel_tiles), 1))
    tiles_per_split = ceil_div(tiles, splits)
    splits = ceil_div(tiles, tiles_per_split)

    block_g = ceil_power_of_2(groups_per_tile)
    return Plan(
        groups_per_tile=groups_per_tile,
        tiles_per_group=tiles_per_group,
        channel_tiles=channel_tiles,
        splits=splits,
        tiles_per_split=tiles_per_split,
        block_c=block_c,
        block_s=block_s,
        block_g=block_g,
        block_p=min(ceil_power_of_2(splits * tiles_per_group), MOST_MERGED // block_g),
        num_warps=max(_floor_power_of_2(block_c * block_s // LANES_PER_WARP), 1),
    )


def _channel_tile(group_channels: int, groups: int, channels_last: bool, itemsize: int) -> tuple[int, int, int]:
    """Groups a tile, tiles a group, and the tile's channels as a power of two: the fewest idle lanes."""
    most = MOST_CHANNELS_LAST if channels_last else MOST_CHANNELS_FIRST
    if group_channels > most:
        return 1, ceil_div(group_channels, most), most

    def cost(groups_per_tile: int) -> tuple[bool, int, int, int]:
        tile_bytes = groups_per_tile * group_channels * itemsize
        lanes = ceil_div(groups, groups_per_tile) * ceil_power_of_2(groups_per_tile * group_channels)
        if not channels_last:
            return False, lanes, 0, groups_per_tile
        # 16 bytes is the widest load, 128 a cache line
        return tile_bytes % 16 != 0, lanes, max(128 - tile_bytes, 0), groups_per_tile

    groups_per_tile = min(range(1, min(groups, MOST_GROUPS, most // group_channels) + 1), key=cost)
    return groups_per_tile, 1, ceil_power_of_2(groups_per_tile * group_channels)


def _floor_power_of_2(n: int) -> int:
    return 1 << n.bit_length() >> 1


def launches(
    x: Tensor,  # [B, C1, *S]
    num_groups: int,
    weight: Tensor | None,  # [C], C = C1 + C2
    bias: Tensor | None,  # [C]
    eps: float,
    activation: str,
    channel_bias: Tensor | None,  # [B, C] or [1, C]
    skip: Tensor | None,  # [B, C2, *S]
) -> tuple[Tensor, tuple[Launch, ...]]:
    """The result, uninitialised, and the launches that fill it in order. Tensors may be on ``meta``."""
    channels_last = is_channels_last(x)
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    y = empty_map(x, channels, channels_last)
    if y.numel() == 0:
        return y, ()

    if skip is not None and (x.shape[1] == 0 or skip.shape[1] == 0):
        x, skip = (skip, None) if x.shape[1] == 0 else (x, None)
    x, skip = dense(x, channels_last), None if skip is None else dense(skip, channels_last)
    weight, bias, channel_bias = contiguous(weight), contiguous(bias), contiguous(channel_bias)

    p, parts, moments = statistics(x, skip, num_groups, channel_bias, channels_last)
    _, _, _, _, *geometry = moments.args
    args = (x, skip, channel_bias, weight, bias, parts, y, eps, *geometry, p.block_p, activation == "silu")
    return y, (moments, Launch(kernels.normalise_activate, moments.grid, args, p.num_warps))


def statistics(
    x: Tensor,  # [B, C1, *S]
    skip: Tensor | None,  # [B, C2, *S]
    num_groups: int,
    channel_bias: Tensor | None,  # [B, C] or [1, C], C = C1 + C2
    channels_last: bool,
) -> tuple[Plan, Tensor, Launch]:
    """The cut of the maps, the moments of its parts, uninitialised, and the launch that fills them.

    The maps are dense in the layout that ``channels_last`` says, the bias is contiguous, and no size is 0.
    """
    batch, x_channels = x.shape[:2]
    channels, space = x_channels + (0 if skip is None else skip.shape[1]), math.prod(x.shape[2:])
    p = plan(batch, channels, num_groups, space, channels_last, x.element_size())
    parts = x.new_empty((batch, p.splits * p.tiles_per_group, 2, num_groups), dtype=torch.float32)
    shape = (x_channels, channels, space, row_stride(channel_bias), p.channel_tiles, p.splits, p.tiles_per_split)
    tile = (
        channels_last, channels // num_groups, p.groups_per_tile, p.tiles_per_group, p.block_c, p.block_s, p.block_g
    )  # fmt: skip
    grid = (batch * p.splits * p.channel_tiles,)
    return p, parts, Launch(kernels.group_statistics, grid, (x, skip, channel_bias, parts, *shape, *tile), p.num_warps)


def reject(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    channel_bias: Tensor | None,
    skip: Tensor | None,
) -> str | None:
    return triton_runtime.reject(x, weight=weight, bias=bias, channel_bias=channel_bias)


def run(x: Tensor, *args: Any) -> Tensor:
    y, steps = launches(x, *args)
    triton_runtime.run(x, steps)
    return y
