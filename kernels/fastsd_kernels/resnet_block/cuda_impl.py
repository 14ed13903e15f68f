"""The CUDA C++ backend: conv2d's kernels.

Where implicit_gemm was measured to be faster for every convolution of a block, the first one notes the moments of its
result, and the second norm has its statistics without a pass over the map. Otherwise each convolution is chosen for
itself, and the second norm reads the map.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastsd_kernels import cuda_runtime
from fastsd_kernels.conv2d import cuda_impl as conv2d
from fastsd_kernels.conv2d import measured
from fastsd_kernels.layout import dense, is_channels_last
from fastsd_kernels.resnet_block.composed import compose

unavailable = cuda_runtime.unavailable


def reject(x: Tensor, *args: object) -> str | None:
    return None if x.device.type == "cuda" else f"x is on {x.device}; the cuda backend needs CUDA tensors"


def run(x: Tensor, conv1_weight: Tensor | None, conv2_weight: Tensor | None, *args: Any) -> Tensor:
    names = measured.fastest_of_block(x, conv1_weight, conv2_weight, args[11])  # the last one of the shortcut
    if x.dtype in conv2d.DTYPES and names and all(name == measured.IMPLICIT_GEMM for name in names):
        multiprocessors = cuda_runtime.multiprocessors(x.device)
        return compute(cuda_runtime.launch, multiprocessors, x, conv1_weight, conv2_weight, *args)
    return dense(compose(conv2d.run, x, conv1_weight, conv2_weight, *args), is_channels_last(x))


def compute(launch: Callable[..., None], multiprocessors: int, x: Tensor, *args: Any) -> Tensor:
    """Every convolution as implicit_gemm through ``launch``, channels last in between; the arguments of the op."""
    noted: conv2d.Moments | None = None  # of the last result

    def convolve(z: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        nonlocal noted
        num_groups, residual = rest[4], rest[13]
        # conv1 alone has a norm and no residual; conv2 comes next and reads its result
        first = num_groups > 0 and residual is None
        y, noted = conv2d.convolve(
            launch, multiprocessors, z, weight, *rest[:-1], moments_of_x=noted, note_moments=first
        )
        return y

    return dense(compose(convolve, dense(x, True), *args), is_channels_last(x))
