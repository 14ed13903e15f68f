"""The CPU C++ backend; kernels in ``csrc/cpu/linear.cpp``."""

from typing import Any

import torch
from torch import Tensor

from fastsd_kernels import cpu_memory, cpu_runtime
from fastsd_kernels.linear import out_features
from fastsd_kernels.rows import as_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unavailable() -> str | None:
    return cpu_runtime.unavailable()


def reject(x: Tensor, *args: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}; the cpu backend needs CPU tensors"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; the cpu backend takes float16, bfloat16 and float32"
    return None


def run(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N or 2 N, K]
    bias: Tensor | None,  # [N or 2 N]
    norm_weight: Tensor | None,  # [K]
    norm_bias: Tensor | None,  # [K]
    norm_eps: float | None,
    activation: str,
    residual: Tensor | None,  # [..., N]
) -> Tensor:
    out = cpu_memory.empty((*x.shape[:-1], out_features(weight, activation)), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    torch.ops.fastsd_cpu.linear.default(
        as_rows(x),
        weight if weight.stride(1) == 1 else weight.contiguous(),
        _float32(bias),
        _float32(norm_weight),
        _float32(norm_bias),
        norm_eps,
        activation,
        None if residual is None else as_rows(residual),
        cpu_runtime.isa(),
        as_rows(out),
    )
    return out


def _float32(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.to(torch.float32).contiguous()
