"""The CPU backend: conv2d's, channels last in between.

The statistics of the second norm are taken by a pass of their own, which finds the map in a cache.
"""

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


def run(x: Tensor, *args: object) -> Tensor:
    channels_last = is_channels_last(x)
    if x.dtype == torch.float32:
        # what the kernels compute in; one conversion for the block instead of several
        x = dense(x, True)
    return dense(compose(conv2d.run, x, *args), channels_last)  # type: ignore[arg-type]
