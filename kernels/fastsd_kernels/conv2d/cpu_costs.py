"""Which algorithm the CPU backend takes: a model of what each costs, in floating-point operations.

Time that goes to something else is counted as the operations that the library's own product does meanwhile, so only
ratios of speeds matter. The constants below were fitted by hand on one machine with AVX-512 and two cores;
``python -m bench crossover`` prints the model's choice beside what it measures.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from fastsd_kernels.conv2d.sizes import TILES, frequencies, tiles_of

# operations for a byte
TRANSFORM = 18  # of the matrices of input and output, written and read
GATHER = {1: 8, 3: 32}  # of columns and their results, by the size of the kernel
REORDER = {1: 40, 3: 130}  # of weights that oneDNN reorders at each call, by the size of the kernel
PASS = 10  # of a map that is read or written by a pass of its own
PREPARE = {1: 18, 2: 21, 4: 28}  # of weights that are read and packed or transformed, by the tile; once for each block
FEWEST_OPERATIONS = 2.0**26  # from which on the time that F(4x4) saves is worth its rounding errors
BLOCK_BYTES = 24 * 2**20  # of the matrices of input and output that csrc/cpu/conv2d.cpp has at once


@dataclass(frozen=True)
class Call:
    """What of a call matters: sizes, and the bytes of the passes that only the direct algorithm makes."""

    batch: int
    channels: int
    out_channels: int
    out_height: int
    out_width: int
    kernel: int
    stride: int
    extra_bytes: int

    @property
    def positions(self) -> int:
        return self.batch * self.out_height * self.out_width

    @property
    def is_empty(self) -> bool:
        return self.positions == 0

    @property
    def algorithms(self) -> tuple[str, ...]:
        """Those that can serve the call."""
        return ("direct", *TILES) if self.kernel == 3 and self.stride == 1 else ("direct", "product")


def cost(algorithm: str, call: Call) -> float:
    """What one call costs."""
    weights = call.kernel**2 * call.channels * call.out_channels
    if algorithm == "direct":
        return 2.0 * weights * call.positions + REORDER[call.kernel] * 4 * weights + PASS * call.extra_bytes
    tile = TILES[algorithm]
    rows = frequencies(tile) * tiles_of(call.batch, call.out_height, call.out_width, tile)
    depth = call.channels * (call.kernel**2 if tile == 1 else 1)
    matrices = 4.0 * rows * (depth + call.out_channels)
    blocks = 1 if tile == 1 else math.ceil(matrices / BLOCK_BYTES)
    moved = (GATHER[call.kernel] if tile == 1 else TRANSFORM) * matrices + PREPARE[tile] * 4.0 * blocks * weights
    return 2.0 * rows * depth * call.out_channels + moved


def cheapest(call: Call, but: Collection[str] = ()) -> str:
    """The algorithm to take for a float32 call, of those that can serve it ``but`` some."""
    is_small = 2.0 * call.kernel**2 * call.channels * call.out_channels * call.positions < FEWEST_OPERATIONS
    left_out = {*but, "winograd4"} if is_small else set(but)
    return min((a for a in call.algorithms if a not in left_out), key=lambda algorithm: cost(algorithm, call))
