"""gri_attention as its definition: plain PyTorch, in any floating-point dtype."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels.gri_attention.geometry import Band, bands, covers, pieces, tokens_of_cells
from fastsd_kernels.heads import laid_out_as


def gri_attention(
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
) -> Tensor:  # [B, heads, N, d]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q_map, k_map, v_map = (x.unflatten(2, tuple(grid)) for x in (q, k, v))
    pool = None if covers(window, grid) else pool
    if pool is not None:
        k_cells, v_cells = pooled(k_map, pool), pooled(v_map, pool)  # [B, heads, G, d]
        if interaction == "agent":
            v_cells = torch.softmax(pooled(q_map, pool) @ k.mT * scale, -1) @ v
        bias = tokens_of_cells(grid, pool, q.device).double().log().to(q.dtype)  # [G]

    rows = []
    for band in bands(grid[0], grid[0] if window is None else window[0]):
        row = []
        for column in bands(grid[1], grid[1] if window is None else window[1]):
            queries = _windows(q_map, band, column)  # [B, heads, rows, columns, w², d]
            scores, values = [], []
            if window is not None:
                scores.append(queries @ _windows(k_map, band, column).mT * scale)
                values.append(_windows(v_map, band, column))
            if pool is not None:
                of_cells = queries @ k_cells[:, :, None, None].mT * scale + bias
                if mask_own_window:
                    inside = _cells_inside(grid, pool, band, column).to(q.device)
                    of_cells = of_cells.masked_fill(inside[:, :, None], -math.inf)
                scores.append(of_cells)
                values.append(v_cells[:, :, None, None])
            if interaction == "gated" and gate is not None and len(scores) == 2:
                regional, global_ = (torch.softmax(s, -1) @ x for s, x in zip(scores, values, strict=True))
                share = torch.sigmoid(gate)[:, None, None, None, None].to(q.dtype)
                result = share * regional + (1 - share) * global_
            else:
                weights = torch.softmax(torch.cat(scores, -1), -1).split([s.shape[-1] for s in scores], -1)
                result = sum(p @ x for p, x in zip(weights, values, strict=True))
            row.append(_map(result, band, column))
        rows.append(torch.cat(row, 3))
    return torch.cat(rows, 2).flatten(2, 3)


def widened(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    """:func:`gri_attention` in float32 or wider, for gradients: scores of 16 bits overflow, and cancel in them."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide: list[Any] = [x.to(dtype) if isinstance(x, Tensor) else x for x in (q, k, v, *args)]
    return gri_attention(*wide).to(q.dtype)


def pooled(x: Tensor, pool: Sequence[int]) -> Tensor:
    """``[B, heads, H, W, d]`` to ``[B, heads, G, d]``: the mean of the tokens that a cell has."""
    planes = x.flatten(0, 1).permute(0, 3, 1, 2)
    means = F.avg_pool2d(planes, tuple(pool), ceil_mode=True, count_include_pad=False)
    return means.flatten(2).mT.unflatten(0, x.shape[:2])


def _windows(x: Tensor, band: Band, column: Band) -> Tensor:
    """``[B, heads, H, W, d]`` to ``[B, heads, rows, columns, w², d]``, the windows of these sizes."""
    part = x[:, :, band.start : band.stop, column.start : column.stop]
    part = part.unflatten(3, (-1, column.window)).unflatten(2, (-1, band.window))
    return part.transpose(3, 4).flatten(4, 5)


def _map(windows: Tensor, band: Band, column: Band) -> Tensor:
    """The way back from :func:`_windows`, to this part of the map."""
    part = windows.unflatten(4, (band.window, column.window)).transpose(3, 4)
    return part.flatten(4, 5).flatten(2, 3)


def _cells_inside(grid: Sequence[int], pool: Sequence[int], band: Band, column: Band) -> Tensor:
    """``[rows, columns, G]``: whether a cell lies inside a window."""
    along = []
    for length, step, cut in ((grid[0], pool[0], band), (grid[1], pool[1], column)):
        first = torch.arange(0, length, step)
        last = first + torch.tensor(pieces(length, step))
        start = torch.arange(cut.start, cut.stop, cut.window)[:, None]
        along.append((first >= start) & (last <= start + cut.window))
    return (along[0][:, None, :, None] & along[1][None, :, None, :]).flatten(2)


def unavailable() -> str | None:
    return None


def reject(*args: object) -> str | None:
    return None


def run(q: Tensor, *args: object) -> Tensor:
    return laid_out_as(q, gri_attention(q, *args))  # type: ignore[arg-type]
