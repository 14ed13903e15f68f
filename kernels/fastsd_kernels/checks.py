"""What the ops check alike about their arguments."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsd_kernels.layout import output_size

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STRIDES = (1, 2)


def check_kind(**tensors: Tensor | None) -> None:
    """Every tensor has a floating-point dtype, and the device of the first, which is there."""
    first, x = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is None or x is None:
            continue
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name}: expected a floating-point dtype (float16, bfloat16, float32, float64); got {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected {first}'s device {x.device}; got {tensor.device}")


def check_dtype(**tensors: Tensor | None) -> None:
    """Every tensor has the dtype of the first, which is there."""
    first, x = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is not None and x is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected {first}'s dtype {x.dtype}; got {tensor.dtype}")


def check_map(x: Tensor) -> None:
    """``x`` is a map of at least one pixel."""
    if x.dim() != 4:
        raise ValueError(f"x: expected [batch, channels, height, width]; got shape {tuple(x.shape)}")
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"x: expected a height and a width of at least 1; got shape {tuple(x.shape)}")


def check_skip(x: Tensor, skip: Tensor | None) -> int:
    """``skip`` can be read behind ``x``; returns how many channels they have together."""
    if skip is None:
        return x.shape[1]
    if skip.dim() != x.dim() or skip.shape[0] != x.shape[0] or skip.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"skip: expected x's shape {tuple(x.shape)} with any number of channels; got {tuple(skip.shape)}"
        )
    return x.shape[1] + skip.shape[1]


def check_vector(name: str, tensor: Tensor | None, channels: int, batch: int | None = None) -> None:
    """``tensor`` is ``[channels]``; where a batch is given, it may also be ``[batch, channels]``."""
    if tensor is None or tensor.shape == (channels,) or (batch is not None and tensor.shape == (batch, channels)):
        return
    by_sample = "" if batch is None else f" or ({batch}, {channels})"
    raise ValueError(f"{name}: expected shape ({channels},){by_sample}; got {tuple(tensor.shape)}")


def check_channel_bias(tensor: Tensor | None, batch: int, channels: int) -> None:
    """``tensor`` is ``[batch, channels]`` or ``[1, channels]``."""
    if tensor is not None and (tensor.dim() != 2 or tensor.shape[1] != channels or tensor.shape[0] not in (1, batch)):
        raise ValueError(
            f"channel_bias: expected shape ({batch}, {channels}) or (1, {channels}); got {tuple(tensor.shape)}"
        )


def check_eps(eps: float) -> None:
    """``eps`` can be added to a variance."""
    if not eps >= 0:
        raise ValueError(f"eps: expected a number that is not negative; got {eps}")


def check_groups(name: str, num_groups: int, channels: int) -> None:
    """``channels``, at least one, fall into so many groups."""
    if num_groups < 1 or channels % num_groups or channels == 0:
        raise ValueError(f"{name}: expected a positive divisor of {channels} channels; got {num_groups}")


def check_norm(
    batch: int, channels: int, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    """A GroupNorm that may be left out (0 groups), and may scale and shift by sample."""
    if num_groups < 0 or (num_groups > 0 and channels % num_groups):
        raise ValueError(f"num_groups: expected 0 or a positive divisor of {channels} channels; got {num_groups}")
    for name, tensor in (("norm_weight", weight), ("norm_bias", bias)):
        if tensor is not None and num_groups == 0:
            raise ValueError(f"{name}: expected None without a norm (num_groups=0); got {tuple(tensor.shape)}")
        check_vector(name, tensor, channels, batch)
    check_eps(eps)


def check_window(x: Tensor, size: Sequence[int], kernel: int, stride: int, padding: Sequence[int]) -> tuple[int, int]:
    """A kernel can be moved over the map ``x``, enlarged to ``size``; returns height and width of the result."""
    if stride not in STRIDES:
        raise ValueError(f"stride: expected 1 or 2; got {stride}")
    if len(padding) != 4 or min(padding) < 0:
        raise ValueError(f"padding: expected a number or (left, right, top, bottom), none negative; got {padding}")
    out_size = output_size(size, kernel, stride, padding)
    if min(out_size) < 1:
        raise ValueError(
            f"x: expected a height and a width that the kernel fits into; got shape {tuple(x.shape)} "
            f"with padding {tuple(padding)}"
        )
    return out_size


def check_residual(residual: Tensor | None, shape: tuple[int, ...]) -> None:
    """``residual`` can be added to a result of this shape."""
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual: expected the result's shape {shape}; got {tuple(residual.shape)}")


def check_choice(name: str, value: str | None, choices: Sequence[str | None]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(filter(None, choices))}; got {value!r}")
