"""The CPU C++ backend; kernels in ``csrc/cpu/group_norm_silu.cpp``."""

from typing import Any

import torch
from torch import Tensor

from fastsd_kernels import cpu_memory, cpu_runtime
from fastsd_kernels.layout import dense, empty_map, is_channels_last

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unavailable() -> str | None:
    return cpu_runtime.unavailable()


def reject(x: Tensor, *args: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}; the cpu backend needs CPU tensors"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; the cpu backend takes float16, bfloat16 and float32"
    return None


def _float32(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or (parameter.dtype is torch.float32 and parameter.is_contiguous()):
        return parameter
    return parameter.to(torch.float32).contiguous()


def run(
    x: Tensor,  # [B, C1, *S]
    num_groups: int,
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    activation: str,
    channel_bias: Tensor | None,  # [B, C] or [1, C]
    skip: Tensor | None,  # [B, C2, *S]
) -> Tensor:
    channels_last = is_channels_last(x)
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    out = empty_map(x, channels, channels_last, empty=cpu_memory.empty_permuted)
    if out.numel() == 0:
        return out

    x = dense(x, channels_last)
    skip = None if skip is None else dense(skip, channels_last)
    torch.ops.fastsd_cpu.group_norm_silu.default(
        x,
        skip,
        _float32(weight),
        _float32(bias),
        _float32(channel_bias),
        num_groups,
        eps,
        activation == "silu",
        channels_last,
        cpu_runtime.isa(),
        out,
    )
    return out
