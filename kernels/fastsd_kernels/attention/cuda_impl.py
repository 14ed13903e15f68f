"""The CUDA C++ backend; kernel in ``csrc/cuda/attention.cu``.

``q``, ``k`` and ``v`` are read by their strides; one whose widths are not side by side is copied.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsd_kernels import cuda_runtime
from fastsd_kernels.cuda_runtime import ELEMENTS, MAX_BLOCKS, VECTOR_BYTES, Launch
from fastsd_kernels.heads import empty_heads

SOURCE = "attention.cu"
DTYPES = (torch.float16, torch.bfloat16)
MAX_WIDTH = 256  # of result rows that registers hold
MAX_ELEMENTS = 2**30  # of one head; keeps the numbers of tokens within 32 bits
WARP = 32
WARP_QUERIES = 16

_MAX_WARPS = 4
_KEYS = ((80, 64), (160, 32), (MAX_WIDTH, 16))  # of a tile, up to a width
_ONE_TILE = (80, 80)  # up to this width, tiles of up to so many keys, where one holds all: texts have 77
_SHARED_BYTES = 99 * 1024  # that every card from compute capability 8.0 on has for one block


@dataclass(frozen=True)
class Plan:
    """The launch of one call."""

    defines: tuple[str, ...]
    attend: Launch
    tiles: int  # of a head's queries


@functools.lru_cache(maxsize=1024)
def plan(
    *,
    batch: int,
    heads: int,
    width: int,
    queries: int,
    keys: int,
    dtype: torch.dtype,
    alignment: int,
    multiprocessors: int,
) -> Plan:
    """The launch for a result that is not empty.

    Args:
        alignment: bytes that the addresses of q, k and v, and all their strides, are a multiple of.
        multiprocessors: of the card; blocks are made smaller until there is one for each of them.
    """
    tile = keys_of_tile(width)
    if width <= _ONE_TILE[0] and keys <= _ONE_TILE[1]:
        tile = math.ceil(keys / WARP_QUERIES) * WARP_QUERIES
    stages = 1 if keys <= tile else 2

    def room(warps: int) -> int:
        return shared_bytes(width, warps, tile, stages)

    warps = warps_of_block(queries, batch * heads, room, multiprocessors)
    tiles = query_tiles(queries, warps)
    return Plan(
        defines=defines(dtype, width, alignment, warps, tile),
        attend=Launch("attention_attend", (batch * heads * tiles, 1, 1), (warps * WARP, 1, 1), room(warps)),
        tiles=tiles,
    )


def defines(dtype: torch.dtype, width: int, alignment: int, warps: int, keys: int) -> tuple[str, ...]:
    """What ``attention.cuh`` is specialised for."""
    return (
        f"DTYPE={ELEMENTS[dtype]}",
        f"HEAD_WIDTH={width}",
        f"VECTOR={vector(dtype, width, alignment)}",
        f"WARPS={warps}",
        f"KEYS={keys}",
    )


def vector(dtype: torch.dtype, width: int, alignment: int) -> int:
    """The elements of one access to q, k and v."""
    return math.gcd(alignment // dtype.itemsize, VECTOR_BYTES // dtype.itemsize, width)


def keys_of_tile(width: int) -> int:
    """The keys that are gone through at a time."""
    return next(keys for widest, keys in _KEYS if width <= widest)


def query_tiles(queries: int, warps: int) -> int:
    return math.ceil(queries / (WARP_QUERIES * warps))


def warps_of_block(queries: int, matrices: int, room: Callable[[int], int], multiprocessors: int) -> int:
    """The most warps with which no block is mostly empty and every multiprocessor has one.

    Args:
        queries: that share their keys. matrices: how many times there are so many.
        room: a block's bytes of shared memory for a number of warps.
    """
    warps = _MAX_WARPS
    while warps > 1 and (
        queries <= WARP_QUERIES * warps // 2
        or matrices * query_tiles(queries, warps) < multiprocessors
        or room(warps) > _SHARED_BYTES
    ):
        warps //= 2
    return warps


def shared_bytes(width: int, warps: int, keys: int, stages: int) -> int:
    """Of queries, and ``stages`` tiles each of keys, values and biases."""
    pitch = math.ceil(width / 16) * 16 + 8
    return 2 * (WARP_QUERIES * warps + 2 * stages * keys) * pitch + 4 * stages * keys


def side_by_side(x: Tensor) -> Tensor:
    """``x`` with the elements of a head's row side by side, as the kernels read them."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def alignment(*maps: Tensor) -> int:
    """Bytes that all addresses and all strides are a multiple of."""
    strides = [
        stride * x.element_size()
        for x in maps
        for size, stride in zip(x.shape[:3], x.stride(), strict=False)
        if size > 1
    ]
    return math.gcd(cuda_runtime.alignment(*maps), *strides)


def unavailable() -> str | None:
    return cuda_runtime.unavailable()


def reject_queries(q: Tensor) -> str | None:
    """Why kernels of ``attention.cuh`` cannot serve queries ``[B, heads, N, d]``, or ``None``."""
    if q.device.type != "cuda":
        return f"q is on {q.device}; the cuda backend needs CUDA tensors"
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}; the cuda backend takes float16 and bfloat16; backend='triton' takes float32"
    if q.shape[3] > MAX_WIDTH:
        return (
            f"q has heads of width {q.shape[3]}; the cuda backend takes up to {MAX_WIDTH}; "
            "backend='triton' takes wider ones, and 'reference' any"
        )
    return reject_elements("q", q)


def reject_elements(name: str, x: Tensor) -> str | None:
    if x.shape[2] * x.shape[3] > MAX_ELEMENTS:
        return (
            f"{name} has {x.shape[2]} tokens of width {x.shape[3]} in each head; "
            f"the cuda backend takes up to {MAX_ELEMENTS} elements of them"
        )
    return None


def reject_blocks(q: Tensor, blocks_of_head: int) -> str | None:
    blocks = q.shape[0] * q.shape[1] * blocks_of_head
    if blocks > MAX_BLOCKS:
        return (
            f"q has {q.shape[0]} samples of {q.shape[1]} heads, which take {blocks} blocks; "
            f"the cuda backend takes up to {MAX_BLOCKS}"
        )
    return None


def reject(q: Tensor, k: Tensor, *args: object) -> str | None:
    # the most blocks that plan() may ask for are of one warp
    return reject_queries(q) or reject_elements("k", k) or reject_blocks(q, query_tiles(q.shape[2], 1))


def run(q: Tensor, *args: object) -> Tensor:
    return compute(cuda_runtime.launch, cuda_runtime.multiprocessors(q.device), q, *args)  # type: ignore[arg-type]


def compute(
    launch: Callable[..., None],
    multiprocessors: int,
    q: Tensor,  # [B, heads, N, d]
    k: Tensor,  # [B, heads, M, d]
    v: Tensor,  # [B, heads, M, d]
    bias: Tensor | None,  # [B, M] or [1, M]
    scale: float | None,
) -> Tensor:  # [B, heads, N, d]
    """The op through ``launch``, which is :func:`fastsd_kernels.cuda_runtime.launch` or works as it does."""
    out = empty_heads(q)
    if out.numel() == 0:
        return out

    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    scale = 1 / math.sqrt(width) if scale is None else scale
    q, k, v = (side_by_side(x) for x in (q, k, v))
    rows = None if bias is None else bias.float().contiguous()
    p = plan(
        batch=batch,
        heads=heads,
        width=width,
        queries=queries,
        keys=keys,
        dtype=q.dtype,
        alignment=alignment(q, k, v),
        multiprocessors=multiprocessors,
    )
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:3]]
    bias_stride = 0 if rows is None or rows.shape[0] == 1 else keys
    launch(
        SOURCE,
        p.attend.kernel,
        p.defines,
        device=q.device,
        grid=p.attend.grid,
        block=p.attend.block,
        shared_bytes=p.attend.shared_bytes,
        args=[
            *(q, k, v, rows, out, *strides, bias_stride, heads, queries, keys, p.tiles),
            scale * math.log2(math.e),
        ],
    )
    return out
