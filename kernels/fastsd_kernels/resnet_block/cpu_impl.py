"""The CPU backend: conv2d's, channels last in between.

The statistics of the second norm are taken by a pass of their own, which finds the map in a cache.
"""

from typing import Any

import torch
from torch import Tensor

from fastsd_kernels import cpu_runtime
from fastsd_kernels.conv2d import cpu_impl as conv2d
from fastsd_kernels.layout import dense, is_channels_last
from fastsd_kernels.resnet_block.composed import compose

unavailable = cpu_runtime.unavailable


def reject(x: Tensor, *args: object) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}; the cpu backend needs CPU tensors"
    if x.dtype not in conv2d.DTYPES:
        return f"x is {x.dtype}; the cpu backend takes float16, bfloat16 and float32"
    return None


def run(
    x: Tensor,  # [B, C1, H, W]
    conv1_weight: Tensor | None,  # [K, C, 3, 3]
    conv2_weight: Tensor | None,  # [K, K, 3, 3]
    conv1_bias: Tensor | None,  # [K]
    conv2_bias: Tensor | None,  # [K]
    skip: Tensor | None,  # [B, C2, H, W]
    *args: Any,
) -> Tensor:
    channels_last = is_channels_last(x)
    if x.dtype == torch.float32:
        # what the kernels compute in; one conversion for the block instead of several
        x, skip = dense(x, True), None if skip is None else dense(skip, True)
    weights = (conv1_weight, conv2_weight, conv1_bias, conv2_bias)
    return dense(compose(conv2d.run, x, *weights, skip, *args), channels_last)
