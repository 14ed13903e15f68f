"""The CUDA C++ backend; kernels in ``csrc/cuda/gri_attention.cu``.

One kernel makes the cells, one attends: to the window's tokens where they lie, and to the cells. For ``"agent"`` torch
makes the cells' values. ``q``, ``k`` and ``v`` are read by their strides; one whose widths are not side by side is
copied.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels import cuda_runtime
from fastsd_kernels.cuda_runtime import ELEMENTS, MAX_BLOCKS, VECTOR_BYTES, Launch
from fastsd_kernels.gri_attention.geometry import cell_count, covers, empty_result

SOURCE = "gri_attention.cu"
DTYPES = (torch.float16, torch.bfloat16)
MAX_WIDTH = 256  # of result rows that registers hold
MAX_ELEMENTS = 2**30  # of one head; keeps the numbers of tokens, and of accesses to cells, within 32 bits

_WARP = 32
_WARP_QUERIES = 16
_MAX_WARPS = 4
_KEYS = ((80, 64), (160, 32), (MAX_WIDTH, 16))  # of a tile, up to a width
_POOL_THREADS = 256
_SHARED_BYTES = 99 * 1024  # that every card from compute capability 8.0 on has for one block


@dataclass(frozen=True)
class Plan:
    """The launches of one call; without cells only the second."""

    defines: tuple[str, ...]
    pool: Launch | None
    attend: Launch
    windows_across: int
    windows: int  # of one head of one sample
    tiles: int  # of a window's queries


@functools.lru_cache(maxsize=1024)
def plan(
    *,
    batch: int,
    heads: int,
    width: int,
    grid: tuple[int, int],
    window: tuple[int, int] | None,
    pool: tuple[int, int] | None,
    gated: bool,
    dtype: torch.dtype,
    alignment: int,
    multiprocessors: int,
) -> Plan:
    """The launches for a map that is not empty.

    Args:
        pool: ``None`` also where one window is the whole map.
        alignment: bytes that the addresses of q, k and v, and all their strides, are a multiple of.
        multiprocessors: of the card; blocks are made smaller until there is one for each of them.
    """
    vector = math.gcd(alignment // dtype.itemsize, VECTOR_BYTES // dtype.itemsize, width)
    keys = next(keys for widest, keys in _KEYS if width <= widest)
    whole = _clipped(window, grid)
    windows_across = math.ceil(grid[1] / whole[1])
    windows = math.ceil(grid[0] / whole[0]) * windows_across

    def tiles(warps: int) -> int:
        return math.ceil(math.prod(whole) / (_WARP_QUERIES * warps))

    warps = _MAX_WARPS
    while warps > 1 and (
        math.prod(whole) <= _WARP_QUERIES * warps // 2
        or batch * heads * windows * tiles(warps) < multiprocessors
        or _shared_bytes(width, warps, keys, gated) > _SHARED_BYTES
    ):
        warps //= 2

    cells = None
    if pool is not None:
        pieces = cell_count(grid, pool) * width // vector
        threads = min(_POOL_THREADS, math.ceil(pieces / _WARP) * _WARP)
        parts = math.ceil(pieces / threads)
        cells = Launch("gri_attention_pool", (batch * heads * 2 * parts, 1, 1), (threads, 1, 1), 0)
    return Plan(
        defines=(
            f"DTYPE={ELEMENTS[dtype]}",
            f"HEAD_WIDTH={width}",
            f"VECTOR={vector}",
            f"WARPS={warps}",
            f"KEYS={keys}",
        ),
        pool=cells,
        attend=Launch(
            "gri_attention_attend",
            (batch * heads * windows * tiles(warps), 1, 1),
            (warps * _WARP, 1, 1),
            _shared_bytes(width, warps, keys, gated),
        ),
        windows_across=windows_across,
        windows=windows,
        tiles=tiles(warps),
    )


def _shared_bytes(width: int, warps: int, keys: int, gated: bool) -> int:
    """Of queries, two tiles each of keys, values and biases; with a gate also of the regions' share of the result."""
    queries = _WARP_QUERIES * warps
    pitch = math.ceil(width / 16) * 16 + 8
    regional = queries * math.ceil(width / 8) * 8 if gated else 0
    return 2 * (queries + 4 * keys) * pitch + 4 * (2 * keys + regional)


def _clipped(window: Sequence[int] | None, grid: Sequence[int]) -> tuple[int, int]:
    """The window, no larger than the map; the map where there is none, whose queries are then cut by tokens alone."""
    height, width = grid if window is None else window
    return min(height, grid[0]), min(width, grid[1])


def unavailable() -> str | None:
    return cuda_runtime.unavailable()


def reject(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    window: Sequence[int] | None,
    pool: Sequence[int] | None,
    *args: object,
) -> str | None:
    if q.device.type != "cuda":
        return f"q is on {q.device}; the cuda backend needs CUDA tensors"
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}; the cuda backend takes float16 and bfloat16; backend='triton' takes float32"
    batch, heads, tokens, width = q.shape
    if width > MAX_WIDTH:
        return (
            f"q has heads of width {width}; the cuda backend takes up to {MAX_WIDTH}; "
            "backend='triton' takes wider ones, and 'reference' any"
        )
    if tokens * width > MAX_ELEMENTS:
        return (
            f"q has {tokens} tokens of width {width} in each head; "
            f"the cuda backend takes up to {MAX_ELEMENTS} elements of them"
        )
    # the most that plan() may ask for: tiles of one warp, cells read element by element
    tiles = math.ceil(math.prod(_clipped(window, grid)) / _WARP_QUERIES)
    windows = math.prod(math.ceil(n / w) for n, w in zip(grid, _clipped(window, grid), strict=True))
    parts = 0 if pool is None else 2 * math.ceil(cell_count(grid, pool) * width / _POOL_THREADS)
    blocks = batch * heads * max(windows * tiles, parts)
    if blocks > MAX_BLOCKS:
        return (
            f"q has {batch} samples of {heads} heads, which take {blocks} blocks; "
            f"the cuda backend takes up to {MAX_BLOCKS}"
        )
    return None


def run(q: Tensor, *args: object) -> Tensor:
    return compute(cuda_runtime.launch, cuda_runtime.multiprocessors(q.device), q, *args)  # type: ignore[arg-type]


def compute(
    launch: Callable[..., None],
    multiprocessors: int,
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
    """The op through ``launch``, which is :func:`fastsd_kernels.cuda_runtime.launch` or works as it does."""
    out = empty_result(q)
    if out.numel() == 0:
        return out

    batch, heads, _, width = q.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    if covers(window, grid):
        pool, gate = None, None
    q, k, v = (x if x.stride(3) == 1 or width == 1 else x.contiguous() for x in (q, k, v))
    gate = None if gate is None else gate.float().contiguous()
    p = plan(
        batch=batch,
        heads=heads,
        width=width,
        grid=(grid[0], grid[1]),
        window=None if window is None else (window[0], window[1]),
        pool=None if pool is None else (pool[0], pool[1]),
        gated=gate is not None,
        dtype=q.dtype,
        alignment=_alignment(q, k, v),
        multiprocessors=multiprocessors,
    )

    def start(kernel: Launch, args: list[Tensor | int | float | None]) -> None:
        launch(
            SOURCE,
            kernel.kernel,
            p.defines,
            device=q.device,
            grid=kernel.grid,
            block=kernel.block,
            shared_bytes=kernel.shared_bytes,
            args=args,
        )

    k_cells, v_cells, cells = None, None, [1, 0]  # across, in all
    if p.pool is not None and pool is not None:
        cells = [math.ceil(grid[1] / pool[1]), cell_count(grid, pool)]
        k_cells, of_other = q.new_empty((2, batch, heads, cells[1], width))
        other = q if interaction == "agent" else v
        sizes = [*k.stride()[:3], *other.stride()[:3], heads, *grid, *pool, *cells]
        start(p.pool, [k, other, k_cells, of_other, *sizes])
        v_cells = of_other
        if interaction == "agent":
            v_cells = F.scaled_dot_product_attention(of_other, k, v, scale=scale).contiguous()
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:3]]
    start(
        p.attend,
        [
            *(q, k, v, k_cells, v_cells, gate, out, *strides, heads, *grid, *_clipped(window, grid)),
            *(int(window is not None), *(pool or (1, 1)), p.windows_across, p.windows, p.tiles, *cells),
            *(int(mask_own_window), scale * math.log2(math.e)),
        ],
    )
    return out


def _alignment(*maps: Tensor) -> int:
    """Bytes that all addresses and all strides are a multiple of."""
    strides = [
        stride * x.element_size()
        for x in maps
        for size, stride in zip(x.shape[:3], x.stride(), strict=False)
        if size > 1
    ]
    return math.gcd(cuda_runtime.alignment(*maps), *strides)
