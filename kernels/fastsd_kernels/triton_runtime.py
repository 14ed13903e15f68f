"""What the ops' Triton backends share: launches that are checked before they are run, and common refusals."""

import functools
import os
import shutil
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    triton = None

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PARAMETER_DTYPES = (*DTYPES, torch.float64)

# Read once, when the ops' kernels are imported: triton.jit does so too
INTERPRETED = triton is not None and triton.knobs.runtime.interpret


class Launch(NamedTuple):
    """One kernel launch: ``kernel[grid](*args, num_warps=num_warps)``."""

    kernel: Any
    grid: tuple[int]
    args: tuple[Any, ...]
    num_warps: int

    def __call__(self) -> None:
        self.kernel[self.grid](*self.args, num_warps=self.num_warps)


def run(device_of: Tensor, steps: Iterable[Launch]) -> None:
    """Launch ``steps`` in order on the device of a tensor."""
    with torch.cuda.device_of(device_of):
        for launch in steps:
            launch()


@functools.cache
def unavailable() -> str | None:
    """Why no Triton kernel can run on this machine, or ``None``."""
    if triton is None:
        return "Triton is not installed; `pip install triton` installs it"
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no GPU; use backend='cpu', or set TRITON_INTERPRET=1 to run the kernels in the interpreter"
    if not INTERPRETED and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to build its launcher; install gcc or clang, or name one in CC"
    return None


def reject(x: Tensor, **parameters: Tensor | None) -> str | None:
    """Why no Triton kernel can serve a map ``x`` and these parameters, whatever their shapes, or ``None``."""
    if x.dtype not in DTYPES:
        return f"expected x in float16, bfloat16 or float32; got {x.dtype}; cast it or use backend='reference'"
    for name, parameter in parameters.items():
        if parameter is not None and parameter.dtype not in PARAMETER_DTYPES:
            return f"expected {name} in float16, bfloat16, float32 or float64; got {parameter.dtype}; cast it"
    if INTERPRETED:
        if x.dtype is torch.bfloat16:
            return "Triton's interpreter rounds bfloat16 wrongly; use float16 or float32, or unset TRITON_INTERPRET"
    elif not x.is_cuda:
        return f"expected x on a GPU; got it on {x.device}; move it there or use backend='cpu'"
    return None


def contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def row_stride(parameter: Tensor | None) -> int:
    """Elements from one sample's row of a parameter ``[B, C]`` to the next; 0 where ``[C]`` or ``[1, C]`` is shared."""
    return 0 if parameter is None or parameter.dim() == 1 or parameter.shape[0] == 1 else parameter.shape[1]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def ceil_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
