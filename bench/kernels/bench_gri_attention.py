"""gri_attention at the self-attentions of SD1.5 (512², 768², 1024²) and SDXL (1024²), against the full attention there.

``eager`` computes another function: full attention by ``scaled_dot_product_attention``. ``composition`` and ``merge``
compute GRI in plain PyTorch: in one call of it for all windows with their cells, and in one for the windows and one for
the cells, merged by their sums of exponentials. ``flex``, with ``--compile``: FlexAttention with a block mask.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fastsd_kernels.gri_attention.geometry import covers
from fastsd_kernels.testing import Sample
from fastsd_kernels.testing.tokens import tokens

Size = tuple[int, int]  # height and width


class Case(NamedTuple):
    """Self-attention of a square map; ``window`` and ``pool``: sides."""

    batch: int
    heads: int
    side: int
    width: int
    window: int
    pool: int


_LAYERS = (
    (1, 8, 64, 40),
    (1, 8, 32, 80),
    (1, 8, 96, 40),
    (1, 8, 128, 40),
    (1, 10, 64, 64),
    (1, 20, 32, 64),
    (2, 8, 64, 40),
)
CASES = {
    f"{batch}x{heads}x{side}x{side}x{width} w{window} s{pool}": Case(batch, heads, side, width, window, pool)
    for batch, heads, side, width in _LAYERS
    for window, pool in ((8, 8), (16, 4))
}


def sample(name: str, device: torch.device, dtype: torch.dtype) -> Sample:
    """Queries, keys and values as projections give them."""
    return sample_of(CASES[name], name, device, dtype)


def sample_of(case: Case, name: str, device: torch.device, dtype: torch.dtype) -> Sample:
    q, k, v = tokens(case.batch, case.heads, case.side**2, case.width, "token_major", device=device, dtype=dtype)
    sides = {"grid": (case.side,) * 2, "window": (case.window,) * 2, "pool": (case.pool,) * 2}
    return Sample(name, {"q": q, "k": k, "v": v, **sides})


def eager(q: Tensor, k: Tensor, v: Tensor, **sizes: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def others(device: torch.device, with_compile: bool = False) -> dict[str, Callable[..., Tensor]]:
    """GRI in plain PyTorch; held to the op's contract too."""
    on_the_cpu = {"merge": merge} if device.type == "cpu" else {}
    return {"composition": composition} | on_the_cpu | ({"flex": flex} if with_compile else {})


def composition(q: Tensor, k: Tensor, v: Tensor, grid: Size, window: Size, pool: Size) -> Tensor:
    """One call for all windows: the keys of each, and behind them all cells."""
    if covers(window, grid):
        return F.scaled_dot_product_attention(q, k, v)
    queries, keys, values = (_windows(x, grid, window) for x in (q, k, v))
    keys, values = (
        torch.cat([of_window, _cells(x, grid, pool)[:, :, None].expand(-1, -1, of_window.shape[2], -1, -1)], 3)
        for of_window, x in ((keys, k), (values, v))
    )
    own = window[0] * window[1]
    bias = q.new_zeros(own, keys.shape[3])
    bias[:, own:] = math.log(pool[0] * pool[1])
    y = F.scaled_dot_product_attention(*(x.flatten(0, 2)[:, None] for x in (queries, keys, values)), attn_mask=bias)
    return _map(y.view_as(queries), grid, window)


def merge(q: Tensor, k: Tensor, v: Tensor, grid: Size, window: Size, pool: Size) -> Tensor:
    """Both branches apart, then the mean weighted by their sums of exponentials."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    regional, of_regional = attend(*(_windows(x, grid, window).flatten(0, 2)[:, None] for x in (q, k, v)))
    regional, of_regional = (
        _map(x.reshape(*q.shape[:2], -1, window[0] * window[1], x.shape[-1]), grid, window)
        for x in (regional, of_regional.unsqueeze(-1))
    )
    global_, of_global = attend(q, _cells(k, grid, pool), _cells(v, grid, pool))
    share = torch.sigmoid(of_regional - of_global.unsqueeze(-1) - math.log(pool[0] * pool[1])).to(q.dtype)
    return share * regional + (1 - share) * global_


def flex(q: Tensor, k: Tensor, v: Tensor, grid: Size, window: Size, pool: Size) -> Tensor:
    """FlexAttention, compiled, over all keys and behind them all cells, with a block mask."""
    attend, block_mask, score_mod = _flex(q.device, grid, window, pool)
    keys, values = (torch.cat([x, _cells(x, grid, pool)], 2) if score_mod else x for x in (k, v))
    return attend(q.contiguous(), keys.contiguous(), values.contiguous(), score_mod=score_mod, block_mask=block_mask)


@functools.cache
def _flex(device: torch.device, grid: Size, window: Size, pool: Size) -> tuple[Callable[..., Tensor], Any, Any]:
    attend = torch.compile(flex_attention, dynamic=False)
    if covers(window, grid):
        return attend, None, None
    count, width, bias = grid[0] * grid[1], grid[1], math.log(pool[0] * pool[1])

    def is_seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same_row = i // width // window[0] == j // width // window[0]
        return (j >= count) | (same_row & (i % width // window[1] == j % width // window[1]))

    def with_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(j >= count, score + bias, score)

    cells = grid[0] // pool[0] * (grid[1] // pool[1])
    return attend, create_block_mask(is_seen, None, None, count, count + cells, device=device), with_bias


def _windows(x: Tensor, grid: Size, window: Size) -> Tensor:
    """``[B, heads, N, d]`` to ``[B, heads, windows, w², d]``."""
    rows = x.unflatten(2, (grid[0] // window[0], window[0], grid[1] // window[1], window[1]))
    return rows.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _map(x: Tensor, grid: Size, window: Size) -> Tensor:
    """The way back."""
    rows = x.unflatten(3, window).unflatten(2, (grid[0] // window[0], grid[1] // window[1]))
    return rows.transpose(3, 4).flatten(2, 5)


def _cells(x: Tensor, grid: Size, pool: Size) -> Tensor:
    """``[B, heads, N, d]`` to ``[B, heads, G, d]``."""
    return x.unflatten(2, (grid[0] // pool[0], pool[0], grid[1] // pool[1], pool[1])).mean((3, 5)).flatten(2, 3)
