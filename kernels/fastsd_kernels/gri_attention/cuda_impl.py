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
from fastsd_kernels.attention import cuda_impl as attention
from fastsd_kernels.attention.cuda_impl import WARP, WARP_QUERIES, query_tiles
from fastsd_kernels.cuda_runtime import Launch
from fastsd_kernels.gri_attention.geometry import cell_count, covers
from fastsd_kernels.heads import empty_heads

SOURCE = "gri_attention.cu"

_POOL_THREADS = 256


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
    keys = attention.keys_of_tile(width)
    whole = _clipped(window, grid)
    windows_across = math.ceil(grid[1] / whole[1])
    windows = math.ceil(grid[0] / whole[0]) * windows_across

    def room(warps: int) -> int:
        # with a gate also of the regions' share of the result
        regional = WARP_QUERIES * warps * math.ceil(width / 8) * 8 if gated else 0
        return attention.shared_bytes(width, warps, keys, stages=2) + 4 * regional

    warps = attention.warps_of_block(math.prod(whole), batch * heads * windows, room, multiprocessors)
    tiles = query_tiles(math.prod(whole), warps)

    cells = None
    if pool is not None:
        vector = attention.vector(dtype, width, alignment)
        pieces = cell_count(grid, pool) * width // vector
        threads = min(_POOL_THREADS, math.ceil(pieces / WARP) * WARP)
        parts = math.ceil(pieces / threads)
        cells = Launch("gri_attention_pool", (batch * heads * 2 * parts, 1, 1), (threads, 1, 1), 0)
    return Plan(
        defines=attention.defines(dtype, width, alignment, warps, keys),
        pool=cells,
        attend=Launch(
            "gri_attention_attend", (batch * heads * windows * tiles, 1, 1), (warps * WARP, 1, 1), room(warps)
        ),
        windows_across=windows_across,
        windows=windows,
        tiles=tiles,
    )


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
    refusal = attention.reject_queries(q)
    if refusal is not None:
        return refusal
    # the most that plan() may ask for: tiles of one warp, cells read element by element
    tiles = query_tiles(math.prod(_clipped(window, grid)), 1)
    windows = math.prod(math.ceil(n / w) for n, w in zip(grid, _clipped(window, grid), strict=True))
    parts = 0 if pool is None else 2 * math.ceil(cell_count(grid, pool) * q.shape[3] / _POOL_THREADS)
    return attention.reject_blocks(q, max(windows * tiles, parts))


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
    out = empty_heads(q)
    if out.numel() == 0:
        return out

    batch, heads, _, width = q.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    if covers(window, grid):
        pool, gate = None, None
    q, k, v = (attention.side_by_side(x) for x in (q, k, v))
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
        alignment=attention.alignment(q, k, v),
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
