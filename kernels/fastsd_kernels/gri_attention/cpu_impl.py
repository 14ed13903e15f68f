"""The CPU C++ backend; kernels in ``csrc/cpu/gri_attention.cpp``."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels import cpu_memory, cpu_runtime
from fastsd_kernels.gri_attention.geometry import covers
from fastsd_kernels.gri_attention.reference import pooled
from fastsd_kernels.heads import empty_heads

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unavailable() -> str | None:
    return cpu_runtime.unavailable()


def reject(q: Tensor, *args: object) -> str | None:
    if q.device.type != "cpu":
        return f"q is on {q.device}; the cpu backend needs CPU tensors"
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}; the cpu backend takes float16, bfloat16 and float32"
    return None


def run(
    q: Tensor,  # [B, heads, N, d]
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    window: Sequence[int] | None,
    pool: Sequence[int] | None,
    interaction: str,
    mask_own_window: bool,
    gate: Tensor | None,  # [heads]
    scale: float | None,
) -> Tensor:
    out = empty_heads(q, cpu_memory.empty_permuted)
    if out.numel() == 0:
        return out
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    pool = None if covers(window, grid) else pool
    v_cells = None
    if pool is not None and interaction == "agent":
        agents = pooled(q.unflatten(2, tuple(grid)), pool)
        v_cells = F.scaled_dot_product_attention(agents, k, v, scale=scale).float().contiguous()
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    window = (0, 0) if window is None else [min(w, n) for w, n in zip(window, grid, strict=True)]
    torch.ops.fastsd_cpu.gri_attention.default(
        q,
        k,
        v,
        *grid,
        *window,
        *((0, 0) if pool is None else pool),
        mask_own_window,
        None if gate is None else torch.sigmoid(gate.float()),
        v_cells,
        scale,
        cpu_runtime.isa(),
        out,
    )
    return out
