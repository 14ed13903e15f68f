"""resnet_block in Triton: conv2d's launches."""

from torch import Tensor

from fastsd_kernels import triton_runtime
from fastsd_kernels.conv2d import triton_impl as conv2d
from fastsd_kernels.resnet_block.composed import compose

unavailable = triton_runtime.unavailable


def reject(x: Tensor, *args: object) -> str | None:
    return triton_runtime.reject(x)


def run(x: Tensor, *args: object) -> Tensor:
    return compose(conv2d.run, x, *args)  # type: ignore[arg-type]
