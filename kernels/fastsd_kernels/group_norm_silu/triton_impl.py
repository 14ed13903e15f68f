"""group_norm_silu in Triton: two launches, without atomics, for either layout."""

import functools
import os
import shutil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsd_kernels.layout import dense, empty_map, is_channels_last

try:
    import triton

    from fastsd_kernels.group_norm_silu import triton_kernels as kernels
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    triton = None

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PARAMETER_DTYPES = (*DTYPES, torch.float64)

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


class Launch(NamedTuple):
    """One kernel launch: ``kernel[grid](*args, num_warps=num_warps)``."""

    kernel: Any
    grid: tuple[int]
    args: tuple[Any, ...]
    num_warps: int

    def __call__(self) -> None:
        self.kernel[self.grid](*self.args, num_warps=self.num_warps)


@functools.cache
def plan(batch: int, channels: int, groups: int, space: int, channels_last: bool, itemsize: int) -> Plan:
    """The tiles for maps ``[batch, channels, space]`` of ``itemsize`` bytes an element; none of the sizes is 0."""
    group_channels = channels // groups
    groups_per_tile, tiles_per_group, block_c = _channel_tile(group_channels, groups, channels_last, itemsize)
    channel_tiles = _ceil_div(groups, groups_per_tile) * tiles_per_group

    lanes_a_program = batch * channel_tiles * block_c * space // FEWEST_PROGRAMS
    lanes = min(max(_floor_power_of_2(lanes_a_program), FEWEST_LANES), MOST_LANES)
    block_s = max(lanes // block_c, 1 if channels_last else FEWEST_POSITIONS_FIRST)
    block_s = min(block_s, _ceil_power_of_2(space))

    tiles = _ceil_div(space, block_s)
    splits = min(tiles, max(MOST_PROGRAMS // (batch * channel_tiles), 1))
    tiles_per_split = _ceil_div(tiles, splits)
    splits = _ceil_div(tiles, tiles_per_split)

    block_g = _ceil_power_of_2(groups_per_tile)
    return Plan(
        groups_per_tile=groups_per_tile,
        tiles_per_group=tiles_per_group,
        channel_tiles=channel_tiles,
        splits=splits,
        tiles_per_split=tiles_per_split,
        block_c=block_c,
        block_s=block_s,
        block_g=block_g,
        block_p=min(_ceil_power_of_2(splits * tiles_per_group), MOST_MERGED // block_g),
        num_warps=max(_floor_power_of_2(block_c * block_s // LANES_PER_WARP), 1),
    )


def _channel_tile(group_channels: int, groups: int, channels_last: bool, itemsize: int) -> tuple[int, int, int]:
    """Groups a tile, tiles a group, and the tile's channels as a power of two: the fewest idle lanes."""
    most = MOST_CHANNELS_LAST if channels_last else MOST_CHANNELS_FIRST
    if group_channels > most:
        return 1, _ceil_div(group_channels, most), most

    def cost(groups_per_tile: int) -> tuple[bool, int, int, int]:
        tile_bytes = groups_per_tile * group_channels * itemsize
        lanes = _ceil_div(groups, groups_per_tile) * _ceil_power_of_2(groups_per_tile * group_channels)
        if not channels_last:
            return False, lanes, 0, groups_per_tile
        # 16 bytes is the widest load, 128 a cache line
        return tile_bytes % 16 != 0, lanes, max(128 - tile_bytes, 0), groups_per_tile

    groups_per_tile = min(range(1, min(groups, MOST_GROUPS, most // group_channels) + 1), key=cost)
    return groups_per_tile, 1, _ceil_power_of_2(groups_per_tile * group_channels)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _ceil_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


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

    batch, space = x.shape[0], y.numel() // (x.shape[0] * channels)
    if skip is not None and (x.shape[1] == 0 or skip.shape[1] == 0):
        x, skip = (skip, None) if x.shape[1] == 0 else (x, None)
    x, skip = dense(x, channels_last), None if skip is None else dense(skip, channels_last)
    weight, bias, channel_bias = _contiguous(weight), _contiguous(bias), _contiguous(channel_bias)
    channel_bias_stride = 0 if channel_bias is None or channel_bias.shape[0] == 1 else channels

    p = plan(batch, channels, num_groups, space, channels_last, x.element_size())
    parts = x.new_empty((batch, p.splits * p.tiles_per_group, 2, num_groups), dtype=torch.float32)
    grid = (batch * p.splits * p.channel_tiles,)
    shape = (x.shape[1], channels, space, channel_bias_stride, p.channel_tiles, p.splits, p.tiles_per_split)
    tile = (
        channels_last, channels // num_groups, p.groups_per_tile, p.tiles_per_group, p.block_c, p.block_s, p.block_g
    )  # fmt: skip
    silu = activation == "silu"
    return y, (
        Launch(kernels.group_statistics, grid, (x, skip, channel_bias, parts, *shape, *tile), p.num_warps),
        Launch(
            kernels.normalise_activate,
            grid,
            (x, skip, channel_bias, weight, bias, parts, y, eps, *shape, silu, *tile, p.block_p),
            p.num_warps,
        ),
    )


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


@functools.cache
def unavailable() -> str | None:
    if triton is None:
        return "Triton is not installed; `pip install triton` installs it"
    if not _interpreted() and not torch.cuda.is_available():
        return "torch sees no GPU; use backend='cpu', or set TRITON_INTERPRET=1 to run the kernels in the interpreter"
    if not _interpreted() and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to build its launcher; install gcc or clang, or name one in CC"
    return None


@functools.cache
def _interpreted() -> bool:
    return not isinstance(kernels.group_statistics, triton.JITFunction)


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
    if x.dtype not in DTYPES:
        return f"expected x in float16, bfloat16 or float32; got {x.dtype}; cast it or use backend='reference'"
    for name, parameter in (("weight", weight), ("bias", bias), ("channel_bias", channel_bias)):
        if parameter is not None and parameter.dtype not in PARAMETER_DTYPES:
            return f"expected {name} in float16, bfloat16, float32 or float64; got {parameter.dtype}; cast it"
    if _interpreted():
        if x.dtype is torch.bfloat16:
            return "Triton's interpreter rounds bfloat16 wrongly; use float16 or float32, or unset TRITON_INTERPRET"
    elif not x.is_cuda:
        return f"expected x on a GPU; got it on {x.device}; move it there or use backend='cpu'"
    return None


def run(x: Tensor, *args: Any) -> Tensor:
    y, steps = launches(x, *args)
    with torch.cuda.device_of(x):
        for launch in steps:
            launch()
    return y
