"""The CUDA C++ backend: conv2d's."""

from torch import Tensor

from fastsd_kernels import cuda_runtime
from fastsd_kernels.conv2d import cuda_impl as conv2d
from fastsd_kernels.resnet_block.composed import compose

unavailable = cuda_runtime.unavailable


def reject(x: Tensor, *args: object) -> str | None:
    return None if x.device.type == "cuda" else f"x is on {x.device}; the cuda backend needs CUDA tensors"


def run(x: Tensor, *args: object) -> Tensor:
    return compose(conv2d.run, x, *args)  # type: ignore[arg-type]
