"""Memory of large results on the CPU, kept for the next ones; the blocks are kept in ``csrc/cpu/memory.cpp``.

What a C library does with a large block that is freed, giving it back to the system or cutting it up, makes the next
result touch fresh pages, and each of those costs a fault. So blocks are kept by their size, as torch keeps a GPU's: a
tensor's returns when its storage dies. At most 512 MiB are kept that nobody uses.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsd_kernels import cpu_runtime

SMALLEST = 1024 * 1024  # bytes of a result; what is smaller the C library keeps well


def empty_permuted(
    shape: Sequence[int], physical_layout: Sequence[int], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """:func:`torch.empty_permuted` on the CPU: uninitialised, dense, dimensions from the outermost to the innermost.

    A large one's storage has as many bytes as the tensor, and cannot be resized.
    """
    size = math.prod(shape) * dtype.itemsize
    block = None if size < SMALLEST else cpu_runtime.extension().take_block(size)
    if block is None:
        return torch.empty_permuted(tuple(shape), tuple(physical_layout), dtype=dtype, device=device)
    strides, stride = [0] * len(shape), 1
    for i in reversed(physical_layout):
        strides[i] = stride
        stride *= shape[i]
    storage = torch.from_dlpack(block).untyped_storage()
    result = torch.empty(0, dtype=dtype, device=device).set_(storage, 0, tuple(shape), strides)
    deterministic: Any = torch.utils.deterministic
    if torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory:
        result.fill_(math.nan if dtype.is_floating_point else torch.iinfo(dtype).max)  # as torch fills its own
    return result


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """:func:`torch.empty` on the CPU, as :func:`empty_permuted`."""
    return empty_permuted(shape, range(len(shape)), dtype=dtype, device=device)


def kept() -> int:
    """How many bytes nobody uses."""
    return 0 if cpu_runtime.unavailable() else cpu_runtime.extension().kept_bytes()


def release() -> None:
    """Gives what nobody uses back to the system."""
    if not cpu_runtime.unavailable():
        cpu_runtime.extension().release_blocks()
