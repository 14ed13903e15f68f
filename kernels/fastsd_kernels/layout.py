"""Layouts and sizes of feature maps ``[B, C, *spatial]``: channels first or channels last."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` keeps its channels innermost, dense or not (a slice of a channels_last map counts).

    A map that is contiguous both ways (one channel, or one pixel) counts as channels first.
    """
    return x.dim() > 2 and x.stride(1) == 1 and not x.is_contiguous()


def is_dense(x: Tensor, channels_last: bool) -> bool:
    """Whether ``x`` fills its storage span without gaps in the given layout."""
    if not channels_last:
        return x.is_contiguous()
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` itself when it is dense in the given layout, else a dense copy."""
    if is_dense(x, channels_last):
        return x
    if channels_last:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def empty_map(
    like: Tensor,
    channels: int,
    channels_last: bool,
    size: Sequence[int] | None = None,
    empty: Callable[..., Tensor] = torch.empty_permuted,
) -> Tensor:
    """An uninitialised map with ``like``'s batch, dtype and device, made by ``empty``; its size too, or ``size``."""
    shape = (like.shape[0], channels, *(like.shape[2:] if size is None else size))
    space = range(2, len(shape))
    return empty(shape, (0, *space, 1) if channels_last else (0, 1, *space), dtype=like.dtype, device=like.device)


def output_size(size: Sequence[int], kernel: int, stride: int, padding: Sequence[int]) -> tuple[int, int]:
    """Height and width of the result for those of the map that is convolved; padding: left, right, top, bottom."""
    left, right, top, bottom = padding
    height, width = size
    return (height + top + bottom - kernel) // stride + 1, (width + left + right - kernel) // stride + 1
