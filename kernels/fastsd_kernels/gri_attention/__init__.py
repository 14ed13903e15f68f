"""Global-regional interactive attention: full attention within windows, pooled attention to the rest of the map."""

import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import SymInt, Tensor

from fastsd_kernels.checks import check_dtype, check_kind
from fastsd_kernels.dispatch import Op
from fastsd_kernels.gradient import gradient_of
from fastsd_kernels.gri_attention.geometry import bands, cell_count, covers
from fastsd_kernels.gri_attention.reference import widened
from fastsd_kernels.heads import empty_heads

INTERACTIONS = ("joint", "gated", "agent")
_SCHEMA = """(
    Tensor q, Tensor k, Tensor v, SymInt[2] grid, SymInt[2]? window, SymInt[2]? pool, str interaction="joint",
    bool mask_own_window=False, Tensor? gate=None, float? scale=None, str? backend=None
) -> Tensor"""


def gri_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    window: int | Sequence[int] | None,
    pool: int | Sequence[int] | None,
    interaction: str = "joint",
    mask_own_window: bool = False,
    gate: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Attention of a map's tokens to all tokens of their own window, and to the pooled tokens of the whole map.

    .. math::
        o_i = \mathrm{softmax}\big(\big[\,s\,q_i K_r^\top,\; s\,q_i K_g^\top + \ln n\,\big]\big)
              \begin{bmatrix} V_r \\ V_g \end{bmatrix}

    K_r and V_r are the keys and values of the window that token i is in. K_g and V_g are means over cells, and n is how
    many tokens each cell stands for: a cell weighs as much as all its tokens would if they were alike. That costs
    N·(w² + G) products of queries and keys instead of N². Where one window is the whole map, there are no cells: it
    is full attention. Windows and cells at the far edges are smaller where the sizes do not divide.

    Args:
        q, k, v: ``[B, heads, N, d]``, float16, bfloat16, float32 or float64; any strides, so that what a projection
            gives, ``x.unflatten(-1, (heads, d)).transpose(1, 2)``, is read where it is, also out of one packed tensor.
        grid: ``(height, width)`` of the map; N = height · width, row by row.
        window: side of the windows, or ``(height, width)``; ``None`` for no regional keys.
        pool: side of the cells, or ``(height, width)``; ``None`` for no global keys.
        interaction: ``"joint"``, the formula above. ``"gated"``: a softmax for either kind of keys, and
            σ(gate)·O_r + (1 − σ(gate))·O_g. ``"agent"``: as joint, but V_g is what the pooled queries get from full
            attention to k and v.
        mask_own_window: leave out the cells that lie inside the query's own window.
        gate: ``[heads]``, any floating-point dtype; for ``"gated"`` alone.
        scale: s; ``None`` for 1/√d.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; ``None`` takes the fastest that serves.

    Returns:
        ``[B, heads, N, d]`` in ``q``'s dtype, dense. Where the heads of a token of ``q`` lie side by side, so do the
        result's: ``transpose(1, 2).flatten(2)`` then copies nothing. Under autocast in its dtype.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; the message names it.
        BackendUnavailable: ``backend`` cannot run here or cannot serve these arguments; the message says why.

    Differentiable, twice, in q, k, v and gate. Source: the name and the purpose are A-SDM's ("global-regional
    interactive attention", 2023), which publishes no equation; the formula is this library's reconstruction.
    """
    return op(
        q,
        k,
        v,
        _pair("grid", grid),
        _pair("window", window),
        _pair("pool", pool),
        interaction,
        mask_own_window,
        gate,
        scale,
        backend,
    )


def _pair(name: str, size: int | Sequence[int] | None) -> list[int] | None:
    if size is None:
        return None
    sizes = size if isinstance(size, Sequence) else (size, size)
    try:
        return [n if isinstance(n, int | SymInt) else operator.index(n) for n in sizes]
    except TypeError:
        raise TypeError(f"{name}: expected an integer or two; got {size!r}") from None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    window: Sequence[int] | None,
    pool: Sequence[int] | None,
    interaction: str,
    mask_own_window: bool,
    gate: Tensor | None,
    scale: float | None,
) -> None:
    if q.dim() != 4:
        raise ValueError(f"q: expected [batch, heads, tokens, width]; got shape {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name}: expected q's shape {tuple(q.shape)}; got {tuple(x.shape)}")
    if q.shape[3] == 0:
        raise ValueError(f"q: expected a width of at least 1; got shape {tuple(q.shape)}")
    # not min(): which side is the smaller is nothing to compile a graph for
    if len(grid) != 2 or grid[0] < 1 or grid[1] < 1 or grid[0] * grid[1] != q.shape[2]:
        raise ValueError(
            f"grid: expected (height, width) of a map of q's {q.shape[2]} tokens, at least one; got {tuple(grid)}"
        )
    for name, size in (("window", window), ("pool", pool)):
        if size is not None and (len(size) != 2 or size[0] < 1 or size[1] < 1):
            raise ValueError(f"{name}: expected a side or (height, width), at least 1; got {tuple(size)}")
    if pool is not None and (pool[0] > grid[0] or pool[1] > grid[1]):
        raise ValueError(f"pool: expected cells no larger than the map of {tuple(grid)}; got {tuple(pool)}")
    if window is None and pool is None:
        raise ValueError("window, pool: expected at least one of them; got None for both")
    if interaction not in INTERACTIONS:
        raise ValueError(f"interaction: expected one of {', '.join(INTERACTIONS)}; got {interaction!r}")
    if interaction == "gated" and (gate is None or window is None or pool is None):
        raise ValueError("interaction: 'gated' expects a window, a pool and a gate; one of them is None")
    if interaction == "agent" and pool is None:
        raise ValueError("interaction: 'agent' expects a pool; got None")
    if gate is not None and interaction != "gated":
        raise ValueError(f"gate: expected None with the interaction {interaction!r}; got shape {tuple(gate.shape)}")
    if gate is not None and gate.shape != (q.shape[1],):
        raise ValueError(f"gate: expected shape ({q.shape[1]},), one number a head; got {tuple(gate.shape)}")
    if mask_own_window and (window is None or pool is None):
        raise ValueError("mask_own_window: expected a window and a pool; one of them is None")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number; got {scale}")
    check_kind(q=q, k=k, v=v, gate=gate)
    check_dtype(q=q, k=k, v=v)


def _fake(q: Tensor, *args: Any) -> Tensor:
    return empty_heads(q)


def _fused_gradient(grad: Tensor, backend: str | None, *inputs: Any) -> tuple[Tensor | None, ...] | None:
    """The gradients to the inputs by Triton, where a GPU's kernels serve and it has them."""
    if op.choose(*inputs, backend=backend).name not in ("triton", "cuda"):
        return None
    if op.backends["triton"].reject(*inputs) is not None:
        return None
    from fastsd_kernels.gri_attention import triton_backward

    if triton_backward.reject(*inputs) is not None:
        return None
    dq, dk, dv, d_gate = triton_backward.gradients(grad, *inputs)
    return dq, dk, dv, None, None, None, None, None, d_gate, None


def _flops(
    y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    window: Sequence[int] | None,
    pool: Sequence[int] | None,
    interaction: str,
    *args: Any,
) -> int:
    """Of queries with the keys of their window and with all cells, and as many with values; of agents with all keys."""
    batch, heads, tokens, width = q.shape
    pairs = 0
    if window is not None:
        rows, columns = (
            sum((band.stop - band.start) * band.window for band in bands(length, step))
            for length, step in zip(grid, window, strict=True)
        )
        pairs += rows * columns
    if pool is not None and not covers(window, grid):
        pairs += (2 if interaction == "agent" else 1) * tokens * cell_count(grid, pool)
    return 4 * batch * heads * width * pairs


_setup_context, _backward = gradient_of(widened, _fused_gradient)

op = Op(
    "gri_attention",
    _SCHEMA,
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast={"cpu": None, "cuda": None},
    flops=_flops,
)
