"""Sizes of the CPU kernels' tiles.

A tile is m × m pixels of the result. ``"product"`` has m = 1: each pixel is one product of a column of inputs (im2col)
with all weights. Winograd's algorithms have a product for each of their (m + 2)² frequencies.
"""

import math

TILES = {"product": 1, "winograd2": 2, "winograd4": 4}


def frequencies(tile: int) -> int:
    """How many products a tile takes."""
    return 1 if tile == 1 else (tile + 2) ** 2


def tiles_of(batch: int, height: int, width: int, tile: int) -> int:
    """How many tiles cover the result."""
    return batch * math.ceil(height / tile) * math.ceil(width / tile)
