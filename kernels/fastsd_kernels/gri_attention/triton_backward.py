"""The gradient of gri_attention in Triton: the probabilities are computed anew, nothing of their size is in memory.

Windows are disjoint, so each of their keys has one program; cells have programs for parts of the queries, and their sum
is taken in one order. Two runs are equal to the bit.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsd_kernels import triton_runtime
from fastsd_kernels.attention.triton_impl import FEWEST, in_vectors
from fastsd_kernels.gri_attention.geometry import covers
from fastsd_kernels.gri_attention.triton_impl import Step, cell_geometry, cells_of, pooled, uneven, windows_of
from fastsd_kernels.heads import empty_heads
from fastsd_kernels.triton_runtime import Launch, ceil_div, ceil_power_of_2

if triton_runtime.triton is not None:
    from fastsd_kernels.gri_attention import triton_backward_kernels as kernels

__all__ = ["gradients", "reject", "steps"]

# Nothing here was measured on a card
# Most queries and keys of a tile, half as many for rows of this many elements; twice the warps beyond this many bytes
MOST_TOKENS, WIDE, WIDE_BYTES = 32, 128, 256
# Up to rows of this many bytes k, v and two stages of q and grad, of the fewest tokens, fit in every card's 99 KB
WIDEST_BYTES = 1024
# Two programs for each multiprocessor of the largest card: with fewer, the queries of cells are split
FEWEST_PROGRAMS = 264

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def reject(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    window: Sequence[int] | None,
    pool: Sequence[int] | None,
    interaction: str,
    *args: object,
) -> str | None:
    """Why there is no gradient in Triton for arguments that the Triton backend serves, or ``None``."""
    if interaction == "agent" and not covers(window, grid):
        return "interaction 'agent' has no gradient in Triton; use its reference's"
    widest = WIDEST_BYTES // q.element_size()
    if q.shape[3] > widest:
        return f"expected q of a width of at most {widest} in {q.dtype}; got {q.shape[3]}; use the reference's gradient"
    return None


def gradients(
    grad: Tensor,  # [B, heads, N, d], as are q, k and v
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],  # height, width; their product is N
    window: Sequence[int] | None,
    pool: Sequence[int] | None,
    interaction: str,
    mask_own_window: bool,
    gate: Tensor | None,  # [heads]
    scale: float | None,
) -> Gradients:
    """The gradients of q, k, v and the gate, for arguments that the Triton backend serves.

    Raises:
        NotImplementedError: :func:`reject` refuses the arguments; the message is its sentence.
    """
    result, todo = steps(grad, q, k, v, grid, window, pool, interaction, mask_own_window, gate, scale)
    with torch.cuda.device_of(q):
        for step in todo:
            step()
    return result


def steps(
    grad: Tensor,
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
) -> tuple[Gradients, list[Step]]:
    """The gradients, uninitialised, and what fills them in order; tensors may be on ``meta``."""
    d_gate = None if gate is None else torch.zeros_like(gate, memory_format=torch.contiguous_format)
    dq, dk, dv = (empty_heads(q) for _ in range(3))
    if q.numel() == 0:
        return (dq, dk, dv, d_gate), []
    refusal = reject(q, k, v, grid, window, pool, interaction)
    if refusal is not None:
        raise NotImplementedError(refusal)
    if covers(window, grid):
        pool = gate = None

    q, k, v, grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, grad))
    batch, heads, count, width = q.shape
    sequences = batch * heads
    scale = 1 / math.sqrt(width) if scale is None else scale
    todo: list[Step] = []
    k_cells: Tensor | None = None
    v_cells: Tensor | None = None
    if pool is not None:
        k_cells, v_cells, pooling = pooled(k, v, grid, pool)
        todo += pooling

    block_d = max(ceil_power_of_2(width), FEWEST)
    block = max(MOST_TOKENS // (1 if q.element_size() == 2 and block_d < WIDE else 2), FEWEST)
    num_warps = 4 if block_d * q.element_size() <= WIDE_BYTES else 8
    height, across, rows, columns = windows_of(grid, window)
    tiles, cell_tiles = ceil_div(height * across, block), ceil_div(cells_of(k_cells), block)
    splits = 1
    if pool is not None:
        splits = max(min(FEWEST_PROGRAMS // (sequences * cell_tiles), ceil_div(count, block)), 1)

    stats = q.new_empty((1 if gate is None else 2, 2, batch, heads, count), dtype=torch.float32)
    parts = d_cells = None
    if k_cells is not None:
        parts = q.new_empty((splits, 2, *k_cells.shape), dtype=torch.float32)
        d_cells = parts[0] if splits == 1 else torch.empty_like(parts[0])
    strides, vector = in_vectors(q, k, v, grad, dq)
    flags = (window is not None, uneven(grid, pool), mask_own_window and pool is not None)

    def launch(step: int) -> Launch:
        of_cells = step == 3
        args = (
            *(q, k, v, grad, dq, dk, dv, k_cells, v_cells, parts if of_cells else d_cells),
            *(None if gate is None else gate.contiguous(), stats, *strides),
            *(scale, scale * math.log2(math.e), sequences * count, sequences * cells_of(k_cells) * width, heads),
            *(*grid, height, across, columns, rows * columns),
            *(cell_tiles if of_cells else tiles, splits, *cell_geometry(grid, pool), step, *flags),
            *(across if columns > 1 else None, width, block_d, vector, block),
        )
        programs = sequences * (cell_tiles * splits if of_cells else rows * columns * tiles)
        return Launch(kernels.gradient, (programs,), args, num_warps)

    todo += [launch(1), launch(2)]
    if parts is not None and d_cells is not None:
        todo.append(launch(3))
        if splits > 1:
            todo.append(functools.partial(_sum_parts, parts, d_cells))
    todo.append(launch(4))
    if gate is not None and d_gate is not None:
        todo.append(functools.partial(_differentiate_gate, stats, gate, d_gate))
    return (dq, dk, dv, d_gate), todo


def _sum_parts(parts: Tensor, total: Tensor) -> None:
    torch.sum(parts, 0, out=total)


def _differentiate_gate(stats: Tensor, gate: Tensor, d_gate: Tensor) -> None:
    _, products = stats.unbind(1)
    share = torch.sigmoid(gate.float())
    d_gate.copy_((products[0] - products[1]).sum((0, 2)) * share * (1 - share))
