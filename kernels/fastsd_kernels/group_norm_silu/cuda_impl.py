"""The CUDA C++ backend; kernels in ``csrc/cuda/group_norm_silu.cu``."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsd_kernels import cuda_runtime
from fastsd_kernels.cuda_runtime import ELEMENTS, MAX_BLOCKS, VECTOR_BYTES, Launch, alignment, of_one_dtype
from fastsd_kernels.layout import dense, empty_map, is_channels_last

SOURCE = "group_norm_silu.cu"

_THREADS = 256
_WARP = 32
_TILE_BYTES = 64  # of a channels-last row: two sectors of memory
_TILE_CHANNELS = 1024  # bounds shared memory
_CHUNK_POSITIONS = 2**20  # keeps offsets inside a block within 32 bits
_BLOCKS_PER_MULTIPROCESSOR = 3  # that many reside at once


@dataclass(frozen=True)
class Plan:
    """How the work is cut up: by samples, tiles of channels and chunks of positions."""

    defines: tuple[str, ...]
    stats: Launch
    apply: Launch
    tile: int  # channels: some whole groups, or a piece of one group
    chunk: int  # positions
    chunks: int
    splits: int  # parts of a group, each with its own partial statistics


@functools.lru_cache(maxsize=1024)
def plan(
    *,
    batch: int,
    x_channels: int,
    skip_channels: int,
    space: int,
    num_groups: int,
    channels_last: bool,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    alignment: int,
    multiprocessors: int,
) -> Plan:
    """The launches for maps of ``x_channels + skip_channels`` channels and ``space`` positions, none of them empty.

    Args:
        alignment: bytes that the addresses of all maps are a multiple of.
        multiprocessors: of the card; the grid is made wide enough for all of them.
    """
    channels = x_channels + skip_channels
    group_width = channels // num_groups
    itemsize = dtype.itemsize
    widths = [VECTOR_BYTES // itemsize >> shift for shift in range(4) if VECTOR_BYTES // itemsize >> shift]
    rows = (x_channels, skip_channels) if channels_last else (space,)

    def fits(vector: int) -> bool:
        tile = math.lcm(group_width, vector) if channels_last else group_width
        return (
            alignment % (vector * itemsize) == 0
            and all(row % vector == 0 for row in rows)
            and (tile <= _TILE_CHANNELS or tile == group_width)
        )

    vector = next(width for width in widths if fits(width))
    if group_width > _TILE_CHANNELS:
        tile = _TILE_CHANNELS
    elif channels_last:
        whole_groups = math.lcm(group_width, vector)
        tile = min(whole_groups * math.ceil(_TILE_BYTES / (whole_groups * itemsize)), channels)
    else:
        tile = group_width
    pieces = math.ceil(group_width / tile)
    tiles = num_groups * pieces if pieces > 1 else math.ceil(channels / tile)

    vectors = math.ceil(tile * space / vector)
    wanted = math.ceil(_BLOCKS_PER_MULTIPROCESSOR * multiprocessors / (batch * tiles))
    chunks = max(min(wanted, math.ceil(vectors / _THREADS)), math.ceil(space / _CHUNK_POSITIONS))
    chunk = math.ceil(space / chunks)
    if not channels_last:
        chunk = math.ceil(chunk / vector) * vector
    chunks = math.ceil(space / chunk)

    threads = min(_THREADS, math.ceil(tile * chunk / vector / _WARP) * _WARP)
    groups = max(1, tile // group_width)
    if channels_last:
        down = threads // min(tile // vector, threads)
        cells = 2 * down * tile
    else:
        cells = threads // _WARP
    grid, block = (batch * tiles * chunks, 1, 1), (threads, 1, 1)
    return Plan(
        defines=(
            f"DTYPE={ELEMENTS[dtype]}",
            f"PARAMETER_DTYPE={ELEMENTS[parameter_dtype]}",
            f"VECTOR={vector}",
            f"CHANNELS_LAST={int(channels_last)}",
        ),
        stats=Launch("group_norm_silu_stats", grid, block, shared_bytes=8 * tile + 4 * (2 * groups + cells)),
        apply=Launch("group_norm_silu_apply", grid, block, shared_bytes=16 * tile + 12 * groups),
        tile=tile,
        chunk=chunk,
        chunks=chunks,
        splits=pieces * chunks,
    )


def unavailable() -> str | None:
    return cuda_runtime.unavailable()


def reject(x: Tensor, num_groups: int, *args: object) -> str | None:
    if x.device.type != "cuda":
        return f"x is on {x.device}; the cuda backend needs CUDA tensors"
    if x.dtype not in ELEMENTS:
        return f"x is {x.dtype}; the cuda backend takes float16, bfloat16 and float32"
    skip = args[-1]
    channels = x.shape[1] + (skip.shape[1] if isinstance(skip, Tensor) else 0)
    if x.shape[0] * channels > MAX_BLOCKS:
        return f"x has {x.shape[0]} samples of {channels} channels; the cuda backend takes up to {MAX_BLOCKS} in all"
    return None


def run(x: Tensor, *args: object) -> Tensor:
    return compute(cuda_runtime.launch, cuda_runtime.multiprocessors(x.device), x, *args)  # type: ignore[arg-type]


def compute(
    launch: Callable[..., None],
    multiprocessors: int,
    x: Tensor,  # [B, C1, *S]
    num_groups: int,
    weight: Tensor | None,  # [C], C = C1 + C2
    bias: Tensor | None,  # [C]
    eps: float,
    activation: str,
    channel_bias: Tensor | None,  # [B, C] or [1, C]
    skip: Tensor | None,  # [B, C2, *S]
) -> Tensor:  # [B, C, *S]
    """The op through ``launch``, which is :func:`fastsd_kernels.cuda_runtime.launch` or works as it does."""
    channels_last = is_channels_last(x)
    batch, x_channels = x.shape[:2]
    skip_channels = 0 if skip is None else skip.shape[1]
    out = empty_map(x, x_channels + skip_channels, channels_last)
    if out.numel() == 0:
        return out

    x = dense(x, channels_last)
    skip = None if skip is None else dense(skip, channels_last)
    weight, bias, channel_bias = of_one_dtype(weight, bias, channel_bias)
    space = x.shape[2:].numel()
    p = plan(
        batch=batch,
        x_channels=x_channels,
        skip_channels=skip_channels,
        space=space,
        num_groups=num_groups,
        channels_last=channels_last,
        dtype=x.dtype,
        parameter_dtype=next((p.dtype for p in (weight, bias, channel_bias) if p is not None), torch.float32),
        alignment=alignment(x, skip, out),
        multiprocessors=multiprocessors,
    )
    partials = x.new_empty((batch, num_groups, p.splits, 3), dtype=torch.float32)  # mean, residue, M2
    channel_bias_stride = 0 if channel_bias is None or channel_bias.shape[0] == 1 else channel_bias.stride(0)
    cut = [x_channels, skip_channels, space, num_groups, channel_bias_stride, p.tile, p.chunk, p.chunks]
    for kernel, args in (
        (p.stats, [x, skip, channel_bias, partials, *cut]),
        (p.apply, [x, skip, weight, bias, channel_bias, partials, out, *cut, eps, int(activation == "silu")]),
    ):
        launch(
            SOURCE,
            kernel.kernel,
            p.defines,
            device=x.device,
            grid=kernel.grid,
            block=kernel.block,
            shared_bytes=kernel.shared_bytes,
            args=args,
        )
    return out
