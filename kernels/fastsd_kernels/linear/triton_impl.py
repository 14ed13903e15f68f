"""linear in Triton: one launch, and with a norm one before it for the moments of the rows.

Neither the normalised rows, nor the values and gates of geglu exist in memory; the price is that the norm is applied
anew for each tile of features. Rows are read where they are. A weight is copied only where neither its rows nor its
columns are of consecutive elements.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsd_kernels import triton_runtime
from fastsd_kernels.cuda_runtime import MAX_BLOCKS
from fastsd_kernels.linear import out_features
from fastsd_kernels.rows import as_rows
from fastsd_kernels.triton_runtime import Launch, ceil_div, ceil_power_of_2, contiguous, unavailable

if triton_runtime.triton is not None:
    from fastsd_kernels.linear import triton_kernels as kernels

__all__ = ["launches", "reject", "run", "unavailable"]


class Tile(NamedTuple):
    """``[block_m rows, block_n features]``, ``block_k`` channels a step; for geglu as many gates as features."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int


# Nothing here was measured on a card: the choice is a guess that fits the registers and shared memory (see the gates)
# For two-byte elements; the largest first
TILES = (Tile(128, 128, 32, 8), Tile(128, 64, 32, 8), Tile(64, 64, 32, 8), Tile(64, 32, 32, 4))
# With as many gates: beside the sums of the widest tile there is no place for them
GATED_TILES = (Tile(128, 64, 32, 8), Tile(64, 64, 32, 4), Tile(64, 32, 32, 4))
# For float32: no tensor cores, so more of the product in each of fewer threads
SINGLE_TILES = (Tile(64, 64, 32, 4), Tile(64, 32, 32, 4))
# Most rows and features of a tile, and channels of a step
MOST_M, MOST_N, MOST_K = 128, 128, 32
# Steps under way at once: one is computed, the others are loaded
STAGES = 4
# One program for each multiprocessor of the largest card: with fewer, smaller tiles are better
FEWEST_PROGRAMS = 132
# The tile of the moments: 32 elements a thread
MOMENTS_M, MOMENTS_K, MOMENTS_WARPS = 4, 512, 2
# Channels or rows of the weight: those of a tile that begins before them are counted in 32 bits
MOST_CHANNELS = 1 << 30


@functools.cache
def tile(rows: int, features: int, gated: bool, itemsize: int) -> Tile:
    """The largest that occupies a card and adds no idle features, else the smallest; ``gated``: with as many gates."""
    tiles = SINGLE_TILES[gated:] if itemsize == 4 else GATED_TILES if gated else TILES
    for t in tiles:
        idle = t.block_n > 64 and ceil_div(features, 64) % 2
        if not idle and ceil_div(rows, t.block_m) * ceil_div(features, t.block_n) >= FEWEST_PROGRAMS:
            break
    return Tile(min(t.block_m, MOST_M), min(t.block_n, MOST_N), min(t.block_k, MOST_K), t.num_warps)


def launches(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K], for geglu [2 N, K]: values, then gates
    bias: Tensor | None,  # [N] or [2 N]
    norm_weight: Tensor | None,  # [K]
    norm_bias: Tensor | None,  # [K]
    norm_eps: float | None,
    activation: str,
    residual: Tensor | None,  # [..., N]
) -> tuple[Tensor, tuple[Launch, ...]]:
    """The result, uninitialised, and the launches that fill it in order. Tensors may be on ``meta``."""
    features = out_features(weight, activation)
    y = x.new_empty((*x.shape[:-1], features))
    if y.numel() == 0:
        return y, ()

    x, residual = as_rows(x), None if residual is None else as_rows(residual)
    weight = weight if 1 in weight.stride() else weight.contiguous()
    bias, norm_weight, norm_bias = contiguous(bias), contiguous(norm_weight), contiguous(norm_bias)
    rows, channels = x.shape
    moments, steps = None, list[Launch]()
    if norm_eps is not None:
        moments = x.new_empty((2, rows), dtype=torch.float32)
        block_k = min(ceil_power_of_2(channels), MOMENTS_K)
        args = (x, moments, norm_eps, x.stride(0), rows, channels, MOMENTS_M, block_k)
        steps.append(Launch(kernels.row_moments, (ceil_div(rows, MOMENTS_M),), args, MOMENTS_WARPS))

    t = tile(rows, features, activation == "geglu", x.element_size())
    row_tiles, column_tiles = ceil_div(rows, t.block_m), ceil_div(features, t.block_n)
    project = (
        *(x, weight, bias, moments, norm_weight, norm_bias, residual, y),
        *(x.stride(0), *weight.stride(), 0 if residual is None else residual.stride(0)),
        *(rows, channels, features, row_tiles, column_tiles),
        *(activation, t.block_m, t.block_n, t.block_k, STAGES),
    )
    return y, (*steps, Launch(kernels.project, (row_tiles * column_tiles,), project, t.num_warps))


def reject(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    activation: str,
    residual: Tensor | None,
) -> str | None:
    sentence = triton_runtime.reject(x, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    if sentence is not None:
        return sentence
    for what, count in (("channels", weight.shape[1]), ("rows", weight.shape[0])):
        if count > MOST_CHANNELS:
            return f"expected weight of at most {MOST_CHANNELS} {what}; got {count}; use backend='reference'"
    rows, features = x.numel() // x.shape[-1], out_features(weight, activation)
    t = tile(rows, features, activation == "geglu", x.element_size())
    programs = ceil_div(rows, t.block_m) * ceil_div(features, t.block_n)
    if norm_eps is not None:
        programs = max(programs, ceil_div(rows, MOMENTS_M))
    if programs > MAX_BLOCKS:
        return f"expected x of at most {MAX_BLOCKS} tiles of rows; got {programs}; use backend='reference'"
    return None


def run(x: Tensor, *args: Any) -> Tensor:
    y, steps = launches(x, *args)
    triton_runtime.run(x, steps)
    return y
