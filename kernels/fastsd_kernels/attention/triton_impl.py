"""attention in Triton: one launch, in the form of FlashAttention; and the tiles of other ops' attention.

Nothing of the size of the scores exists in memory. A tensor is copied only where its rows are not of consecutive
elements.
"""

import functools
import math
from typing import NamedTuple

from torch import Tensor

from fastsd_kernels import triton_runtime
from fastsd_kernels.cuda_runtime import MAX_BLOCKS
from fastsd_kernels.heads import empty_heads
from fastsd_kernels.triton_runtime import Launch, ceil_div, ceil_power_of_2, unavailable

if triton_runtime.triton is not None:
    from fastsd_kernels.attention import triton_kernels as kernels

__all__ = ["launches", "reject", "run", "unavailable"]

# Nothing here was measured on a card: the choice is a guess that fits the registers and shared memory (see the gates)
# Most queries of a program, and most keys of a step
MOST_M, MOST_N = 64, 32
# Elements of q that a program holds, and of k in a step
MOST_Q_ELEMENTS, MOST_K_ELEMENTS = 64 * 160, 32 * 64
# Steps under way at once
STAGES = 3
# The least that tensor cores multiply
FEWEST = 16
WIDEST = 512
# The widest access, in elements of one byte
WIDEST_ACCESS = 16
# Queries or keys: those of a tile that begins before them are counted in 32 bits
MOST_TOKENS = 1 << 30


class Parts(NamedTuple):
    """The powers of two that a row is held in."""

    main: int
    rest: int | None

    @property
    def padded(self) -> int:
        return self.main + (self.rest or 0)


class Tile(NamedTuple):
    """``block_m`` queries, and ``block_n`` keys a step."""

    block_m: int
    block_n: int
    num_warps: int
    stages: int


@functools.cache
def parts(width: int) -> Parts:
    """One power of two, or two where they pad less."""
    whole = max(ceil_power_of_2(width), FEWEST)
    main = whole // 2
    if main < FEWEST or width <= main:
        return Parts(whole, None)
    rest = max(ceil_power_of_2(width - main), FEWEST)
    return Parts(whole, None) if rest == main else Parts(main, rest)


@functools.cache
def tile(queries: int, keys: int, width: int, itemsize: int) -> Tile:
    """The tile for ``queries`` that attend to the same keys, at most ``keys`` of them."""
    padded = parts(width).padded
    most_m, most_n, q_elements, k_elements = MOST_M, MOST_N, MOST_Q_ELEMENTS, MOST_K_ELEMENTS
    if itemsize == 4:
        # no tensor cores: more threads for each product, and half the elements in the same bytes
        most_m, most_n, q_elements, k_elements = most_m // 2, most_n // 2, q_elements // 2, k_elements // 2
    block_m = max(min(ceil_power_of_2(queries), most_m), FEWEST)
    while block_m > FEWEST and block_m * padded > q_elements:
        block_m //= 2
    block_n = max(min(ceil_power_of_2(keys), most_n), FEWEST)
    while block_n > FEWEST and block_n * padded > k_elements:
        block_n //= 2
    if itemsize == 4:
        return Tile(block_m, block_n, block_m // 4, 1)
    # a warp has the sums of 16 queries in its registers, of half or a quarter of their width where that is too much
    num_warps = block_m // FEWEST * (1 if padded <= 160 else 2 if padded <= 256 else 4)
    # and shares the addresses of the keys with another
    return Tile(block_m, block_n, max(num_warps, 1 if padded <= 96 else 2), STAGES)


def launches(
    q: Tensor,  # [B, heads, N, d]
    k: Tensor,  # [B, heads, M, d]
    v: Tensor,  # [B, heads, M, d]
    bias: Tensor | None,  # [B, M] or [1, M]
    scale: float | None,
) -> tuple[Tensor, tuple[Launch, ...]]:
    """The result, uninitialised, and the launches that fill it. Tensors may be on ``meta``."""
    y = empty_heads(q)
    if y.numel() == 0:
        return y, ()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, queries, width = q.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    t = tile(queries, k.shape[2], width, q.element_size())
    tiles = ceil_div(queries, t.block_m)
    strides, vector = in_vectors(q, k, v, y)
    args = (
        *(q, k, v, bias, y, *strides, *bias_strides(bias)),
        *(scale * math.log2(math.e), heads, queries, k.shape[2], tiles),
        *(width, *parts(width), vector, t.block_m, t.block_n, t.stages),
    )
    return y, (Launch(kernels.attend_all, (batch * heads * tiles,), args, t.num_warps),)


def in_vectors(*tensors: Tensor) -> tuple[list[int], int]:
    """The strides of batch, head and token, in units of as many elements as divide them all; and that many.

    Triton knows of a stride whether 16 divides it, and nothing else: that of 40 elements would end wide accesses.
    """
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    vector = math.gcd(WIDEST_ACCESS, *strides)
    return [stride // vector for stride in strides], vector


def bias_strides(bias: Tensor | None) -> tuple[int, int]:
    """From sample to sample, and from key to key."""
    if bias is None:
        return 0, 0
    return bias.stride(0) if bias.shape[0] > 1 else 0, bias.stride(1)


def reject(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float | None,
) -> str | None:
    if q.shape[3] > WIDEST:
        return f"expected q of a width of at most {WIDEST}; got {q.shape[3]}; use backend='reference'"
    sentence = triton_runtime.reject(q, bias=bias)
    if sentence is not None:
        return sentence.replace("expected x ", "expected q ")
    for name, x in (("q", q), ("k", k)):
        if x.shape[2] > MOST_TOKENS:
            return f"expected {name} of at most {MOST_TOKENS} tokens; got {x.shape[2]}; use backend='reference'"
    block_m = tile(q.shape[2], k.shape[2], q.shape[3], q.element_size()).block_m
    programs = q.shape[0] * q.shape[1] * ceil_div(q.shape[2], block_m)
    if programs > MAX_BLOCKS:
        return f"expected q of at most {MAX_BLOCKS} tiles of queries; got {programs}; use backend='reference'"
    return None


def run(q: Tensor, *args: object) -> Tensor:
    y, steps = launches(q, *args)  # type: ignore[arg-type]
    triton_runtime.run(q, steps)
    return y
