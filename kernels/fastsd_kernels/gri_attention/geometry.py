"""How a map is cut: into windows, whose tokens attend to each other, and into cells, which are pooled.

Both start at the map's corner; those at its far edges are smaller where the sizes do not divide.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Size = tuple[int, int]  # height and width


def pieces(length: int, step: int) -> list[int]:
    """The lengths of the pieces that an axis is cut into."""
    return [min(step, length - start) for start in range(0, length, step)]


class Band(NamedTuple):
    """Windows of one length along an axis: ``[start, stop)`` cut into windows of ``window``."""

    start: int
    stop: int
    window: int


def bands(length: int, window: int) -> list[Band]:
    """The windows of an axis by their length: the whole ones, and the one at the edge if it is shorter."""
    whole = length - length % window
    return [Band(*band) for band in ((0, whole, window), (whole, length, length - whole)) if band[0] < band[1]]


def covers(window: Sequence[int] | None, grid: Sequence[int]) -> bool:
    """Whether one window is the whole map, so that regional attention is full attention."""
    return window is not None and window[0] >= grid[0] and window[1] >= grid[1]


def cell_count(grid: Sequence[int], pool: Sequence[int]) -> int:
    """G, how many cells there are."""
    return math.ceil(grid[0] / pool[0]) * math.ceil(grid[1] / pool[1])


def tokens_of_cells(grid: Sequence[int], pool: Sequence[int], device: torch.device | None = None) -> Tensor:
    """``[G]``: how many tokens each cell stands for."""
    heights, widths = (torch.tensor(pieces(n, s), device=device) for n, s in zip(grid, pool, strict=True))
    return torch.outer(heights, widths).flatten()
