"""Memory of large results on the CPU, kept for the next ones.

What a C library does with a large block that is freed, giving it back to the system or cutting it up, makes the next
result touch fresh pages, and each of those costs a fault: of a step of a U-Net up to a tenth of the time, measured on a
virtual machine. So blocks are kept by their size, as torch keeps a GPU's: a tensor's returns when its last view dies.
"""

import collections
import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1024 * 1024  # bytes of a result; what is smaller the C library keeps well
MOST_KEPT = 512 * 1024 * 1024  # bytes of blocks that nobody uses

_HUGE_PAGE = 2 * 1024 * 1024
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)

_lock = threading.Lock()
_free: collections.OrderedDict[int, list[mmap.mmap]] = collections.OrderedDict()  # by bytes, used last at the end
_returned: collections.deque[mmap.mmap] = collections.deque()


def empty_permuted(
    shape: Sequence[int], physical_layout: Sequence[int], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """:func:`torch.empty_permuted` on the CPU: uninitialised, dense, dimensions from the outermost to the innermost.

    A large one's storage has as many bytes as the tensor, and cannot be resized.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < SMALLEST:
        return torch.empty_permuted(tuple(shape), tuple(physical_layout), dtype=dtype, device=device)
    block = _take(size)
    lease = np.frombuffer(block, np.uint8)
    weakref.finalize(lease, _give_back, block).atexit = False
    strides, stride = [0] * len(shape), 1
    for i in reversed(physical_layout):
        strides[i] = stride
        stride *= shape[i]
    storage = torch.from_numpy(lease).untyped_storage()
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
    with _lock:
        _sort()
        return _bytes()


def release() -> None:
    """Gives what nobody uses back to the system."""
    with _lock:
        _sort()
        _free.clear()


def _take(size: int) -> mmap.mmap:
    with _lock:
        _sort()
        if blocks := _free.get(size):
            _free.move_to_end(size)
            return blocks.pop()
    # private: a process that is forked off must not write into its parent's results
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _ADVICE is not None and size >= _HUGE_PAGE:
        with contextlib.suppress(OSError):  # of a kernel without huge pages
            block.madvise(_ADVICE)
    return block


def _give_back(block: mmap.mmap) -> None:
    """Called wherever a tensor dies: maybe in the middle of what holds the lock, which the rest is left to then."""
    _returned.append(block)
    if _lock.acquire(blocking=False):
        try:
            _sort()
        finally:
            _lock.release()


def _sort() -> None:
    """Puts what came back with its like; what was used longest ago is let go. Under the lock."""
    while _returned:
        block = _returned.popleft()
        _free.setdefault(len(block), []).append(block)
        _free.move_to_end(len(block))
    while _bytes() > MOST_KEPT:
        size, blocks = next(iter(_free.items()))
        if blocks:
            blocks.pop()
        else:
            del _free[size]


def _bytes() -> int:
    return sum(size * len(blocks) for size, blocks in _free.items())
