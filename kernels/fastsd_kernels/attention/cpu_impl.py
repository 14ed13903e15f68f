"""The CPU C++ backend; kernels in ``csrc/cpu/attention.cpp``."""

import math

import torch
from torch import Tensor

from fastsd_kernels import cpu_memory, cpu_runtime
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
    k: Tensor,  # [B, heads, M, d]
    v: Tensor,  # [B, heads, M, d]
    bias: Tensor | None,  # [B, M] or [1, M]
    scale: float | None,
) -> Tensor:
    out = empty_heads(q, cpu_memory.empty_permuted)
    if out.numel() == 0:
        return out
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    rows = None if bias is None else bias.float().expand(q.shape[0], -1).contiguous()
    torch.ops.fastsd_cpu.attention.default(q, k, v, rows, scale, cpu_runtime.isa(), out)
    return out
