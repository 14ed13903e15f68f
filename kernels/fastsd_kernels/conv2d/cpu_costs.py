"""Which algorithm the CPU backend takes: a model of what each costs, in floating-point operations.

Time that goes to something else is counted as the operations that the library's own product does meanwhile, so only
ratios of speeds matter. The constants below were fitted by hand on one machine with AVX-512 and two cores;
``python -m bench crossover`` prints the model's choice beside what it measures.
"""

import math
from dataclasses import dataclass

from fastsd_kernels.conv2d.sizes import TILES, frequencies, packed_shape, tiles_of

# operations for a byte
READ_WEIGHTS = 12  # of packed weights, where they are read more slowly than they are used
DIGEST = 18  # of weights of which a copy is used
TRANSFORM = 18  # of the matrices of input and output, written and read
GATHER = {1: 8, 3: 32}  # of columns and their results, by the size of the kernel
PACK_PANELS = 22  # of weights that are multiplied with columns: read, and packed panel by panel
PACK = 110  # of packed weights that live for one call; most of it goes to the system, for fresh memory
REORDER = {1: 40, 3: 130}  # of weights that oneDNN reorders at each call, by the size of the kernel
PASS = 10  # of a map that is read or written by a pass of its own
# Where copies are kept, an algorithm has to be so much faster than one that takes less memory: F(4×4)'s weights are
# 2.25 times those of F(2×2), and columns have none. So SD1.5's copies take less than the model.
FEWEST_GAIN = {"winograd4": 1.25, "winograd2": 1.6}


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
        """Those that can serve the call, by the memory that their weights take."""
        return ("direct", *TILES) if self.kernel == 3 and self.stride == 1 else ("direct", "product")

    def packed_bytes(self, algorithm: str) -> int:
        """What the weights of an algorithm take beside the original."""
        if algorithm in ("direct", "product"):
            return 0
        return 4 * math.prod(packed_shape(self.out_channels, self.channels, TILES[algorithm]))


def compute_cost(algorithm: str, call: Call) -> float:
    """What one call costs, apart from packing weights."""
    weights = call.kernel**2 * call.channels * call.out_channels
    if algorithm == "direct":
        return 2.0 * weights * call.positions + REORDER[call.kernel] * 4 * weights + PASS * call.extra_bytes
    tile = TILES[algorithm]
    rows = frequencies(tile) * tiles_of(call.batch, call.out_height, call.out_width, tile)
    if tile == 1:
        depth = call.channels * call.kernel**2
        moved = PACK_PANELS * weights + GATHER[call.kernel] * rows * (depth + call.out_channels)
        return 2.0 * rows * depth * call.out_channels + 4.0 * moved
    product = max(2.0 * rows * call.channels * call.out_channels, READ_WEIGHTS * float(call.packed_bytes(algorithm)))
    return product + 4.0 * (DIGEST * weights + TRANSFORM * rows * (call.channels + call.out_channels))


def costs(call: Call, kept_tile: int | None, room: int) -> dict[str, float]:
    """Per algorithm that can serve the call, its cost.

    Args:
        kept_tile: that of the copy of the weights that is there, if one is.
        room: how many bytes a copy may take that will be there the next time.
    """
    result = {}
    for algorithm in call.algorithms:
        size = call.packed_bytes(algorithm)
        is_there = kept_tile == TILES.get(algorithm) if kept_tile is not None else size <= room
        result[algorithm] = compute_cost(algorithm, call) + (0.0 if is_there else PACK * float(size))
    return result


def cheapest(call: Call, kept_tile: int | None = None, room: int = 0) -> str:
    """The algorithm to take for a float32 call."""
    of = costs(call, kept_tile, room)
    fewest_gain = FEWEST_GAIN if room > 0 else {}
    best = "direct"
    for algorithm in call.algorithms:
        if of[algorithm] * fewest_gain.get(algorithm, 1.0) < of[best]:
            best = algorithm
    return best
