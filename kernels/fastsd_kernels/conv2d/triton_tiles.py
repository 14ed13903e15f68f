"""What a program of the Triton convolution computes: the set that a choice is made from. The tests compile each."""

from typing import NamedTuple


class Tile(NamedTuple):
    """``[block_m positions, block_n channels]``, ``block_k`` channels of one tap a step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int


# By name, for two-byte elements
TILES = {
    f"{tile.block_m}x{tile.block_n}": tile
    for tile in (
        Tile(128, 128, 32, 8),
        Tile(128, 64, 32, 8),
        Tile(64, 128, 32, 8),
        Tile(64, 64, 32, 8),
        Tile(64, 32, 32, 4),
        Tile(64, 16, 32, 4),
    )
}
