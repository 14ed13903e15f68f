"""gri_attention in Triton: one launch that pools, one that attends, without atomics or copies in another order.

Nothing of the size of the scores exists in memory. The interaction "agent" has torch's own attention between the two,
for what the pooled queries get from all tokens. A tensor is copied only where its rows are not of consecutive elements.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels import triton_runtime
from fastsd_kernels.attention.triton_impl import FEWEST, WIDEST, in_vectors, parts, tile
from fastsd_kernels.cuda_runtime import MAX_BLOCKS
from fastsd_kernels.gri_attention.geometry import cell_count, covers
from fastsd_kernels.heads import empty_heads
from fastsd_kernels.triton_runtime import Launch, ceil_div, ceil_power_of_2, unavailable

if triton_runtime.triton is not None:
    from fastsd_kernels.gri_attention import triton_kernels as kernels

__all__ = ["Step", "launches", "reject", "run", "unavailable"]

# Elements of a cell that one warp adds up at once
POOLED_ELEMENTS = 1024

Step = Launch | functools.partial[None]


def launches(
    q: Tensor,  # [B, heads, N, d]
    k: Tensor,  # [B, heads, N, d]
    v: Tensor,  # [B, heads, N, d]
    grid: Sequence[int],  # height, width; their product is N
    window: Sequence[int] | None,
    pool: Sequence[int] | None,
    interaction: str,
    mask_own_window: bool,
    gate: Tensor | None,  # [heads]
    scale: float | None,
) -> tuple[Tensor, tuple[Step, ...]]:
    """The result, uninitialised, and the steps that fill it in order, :class:`Launch` but for the agents' attention.

    Tensors may be on ``meta``.
    """
    y = empty_heads(q)
    if y.numel() == 0:
        return y, ()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    width = q.shape[3]
    scale = 1 / math.sqrt(width) if scale is None else scale
    if covers(window, grid):
        pool = gate = None

    steps: list[Step] = []
    k_cells: Tensor | None = None
    v_cells: Tensor | None = None
    if pool is not None and interaction == "agent":
        q_cells, k_cells, pooling = pooled(q, k, grid, pool)
        v_cells = torch.empty_like(k_cells)
        steps += [*pooling, functools.partial(_agents_attend, q_cells, k, v, scale, v_cells)]
    elif pool is not None:
        k_cells, v_cells, pooling = pooled(k, v, grid, pool)
        steps += pooling

    height, across, rows, columns = windows_of(grid, window)
    places = height * across
    t = tile(places, max(places if window is not None else 1, cells_of(k_cells)), width, q.element_size())
    tiles = ceil_div(places, t.block_m)
    strides, vector = in_vectors(q, k, v, y)
    args = (
        *(q, k, v, k_cells, v_cells, None if gate is None else gate.contiguous(), y, *strides),
        *(scale * math.log2(math.e), q.shape[1], *grid, height, columns, rows * columns, tiles),
        *cell_geometry(grid, pool),
        *(window is not None, uneven(grid, pool), mask_own_window and pool is not None),
        *(across if columns > 1 else None, width, *parts(width), vector, t.block_m, t.block_n, t.stages),
    )
    programs = q.shape[0] * q.shape[1] * rows * columns * tiles
    return y, (*steps, Launch(kernels.attend, (programs,), args, t.num_warps))


def pooled(a: Tensor, b: Tensor, grid: Sequence[int], pool: Sequence[int]) -> tuple[Tensor, Tensor, list[Launch]]:
    """The means ``[B, heads, G, d]`` of two tensors, uninitialised, and the launch that fills them, if any."""
    if pool[0] == pool[1] == 1:
        return a.contiguous(), b.contiguous(), []
    batch, heads, _, width = a.shape
    cells = cell_count(grid, pool)
    a_cells, b_cells = (x.new_empty((batch, heads, cells, width)) for x in (a, b))
    columns = ceil_div(grid[1], pool[1])
    block_d = ceil_power_of_2(width)
    block_t = min(ceil_power_of_2(pool[0] * pool[1]), max(POOLED_ELEMENTS // block_d, 1))
    strides, vector = in_vectors(a, b)
    args = (
        *(a, b, a_cells, b_cells, *strides, heads, *grid, pool[0], columns, cells),
        *(pool[1] if columns > 1 else None, width, block_d, vector, block_t),
    )
    return a_cells, b_cells, [Launch(kernels.pool_cells, (batch * heads * cells,), args, 1)]


def windows_of(grid: Sequence[int], window: Sequence[int] | None) -> tuple[int, int, int, int]:
    """Height and width of a whole window, how many are below each other, and how many side by side."""
    height, width = grid if window is None else map(min, window, grid)
    return height, width, ceil_div(grid[0], height), ceil_div(grid[1], width)


def cells_of(cells: Tensor | None) -> int:
    return 0 if cells is None else cells.shape[2]


def cell_geometry(grid: Sequence[int], pool: Sequence[int] | None) -> tuple[int, int, int, int, float]:
    """Height and width of a whole cell, cells side by side, cells, and log2 of a whole cell's tokens."""
    if pool is None:
        return 1, 1, 1, 0, 0.0
    return (*pool, ceil_div(grid[1], pool[1]), cell_count(grid, pool), math.log2(pool[0] * pool[1]))  # type: ignore


def uneven(grid: Sequence[int], pool: Sequence[int] | None) -> bool:
    """Whether some cells are smaller than others."""
    return pool is not None and any(n % size for n, size in zip(grid, pool, strict=True))


def _agents_attend(q_cells: Tensor, k: Tensor, v: Tensor, scale: float, v_cells: Tensor) -> None:
    v_cells.copy_(F.scaled_dot_product_attention(q_cells, k, v, scale=scale))


def reject(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    window: Sequence[int] | None,
    pool: Sequence[int] | None,
    interaction: str,
    mask_own_window: bool,
    gate: Tensor | None,
    scale: float | None,
) -> str | None:
    if q.shape[3] > WIDEST:
        return f"expected q of a width of at most {WIDEST}; got {q.shape[3]}; use backend='reference'"
    sentence = triton_runtime.reject(q, gate=gate)
    if sentence is not None:
        return sentence.replace("expected x ", "expected q ")
    # the most that the forward and the backward pass ask for: tiles of the fewest tokens
    height, across, rows, columns = windows_of(grid, window)
    cells = 0 if pool is None else cell_count(grid, pool)
    programs = q.shape[0] * q.shape[1] * max(rows * columns * ceil_div(height * across, FEWEST), cells)
    if programs > MAX_BLOCKS:
        return f"expected q of at most {MAX_BLOCKS} tiles of tokens; got {programs}; use backend='reference'"
    return None


def run(q: Tensor, *args: object) -> Tensor:
    y, steps = launches(q, *args)  # type: ignore[arg-type]
    with torch.cuda.device_of(q):
        for step in steps:
            step()
    return y
