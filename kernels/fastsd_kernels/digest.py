"""Digests of tensors: whether one holds what it held when something was made from it, however it was edited since.

Edits through ``.data``, which fusing an adapter does, and through numpy leave no other trace, and a new tensor may get
the address of one that is gone. So all of it is read, as fast as memory gives it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastsd_kernels import cpu_runtime


def digest(x: Tensor) -> tuple[Any, ...] | None:
    """Shape, dtype and a 64-bit hash of the bits of ``x``, which is only read.

    Those of two tensors that differ in one element are never the same; of others they are, by chance, about once in
    2^64. Who sets out to make two that are the same may succeed: it is no signature.

    Returns:
        ``None`` for what has no plain numbers side by side in this machine's memory (subclasses of tensors, other
        devices, sparse or quantised, with gaps, of freed memory), or where the CPU extension is not there.
    """
    is_plain = (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and x.is_floating_point()
        and x.is_contiguous()
        and x.untyped_storage().nbytes() >= (x.storage_offset() + x.numel()) * x.element_size()
    )
    if not is_plain or cpu_runtime.unavailable() is not None:
        return None
    return x.shape, x.dtype, torch.ops.fastsd_cpu.digest.default(x, cpu_runtime.isa())
