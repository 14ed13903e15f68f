"""conv2d as its definition: plain PyTorch, in any floating-point dtype."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels.layout import dense, is_channels_last


def conv2d(
    x: Tensor,  # [B, C1, H, W]
    weight: Tensor,  # [K, C, R, R], C = C1 + C2, R = 1 or 3
    bias: Tensor | None,  # [K]
    stride: int,
    padding: Sequence[int],  # left, right, top, bottom
    skip: Tensor | None,  # [B, C2, H, W]
    num_groups: int,  # 0: no normalisation
    norm_weight: Tensor | None,  # [C] or [B, C]
    norm_bias: Tensor | None,  # [C] or [B, C]
    eps: float,
    mean: Tensor | None,  # [B, num_groups]
    rstd: Tensor | None,  # [B, num_groups]
    activation: str,
    upsample_size: Sequence[int] | None,  # height, width
    channel_bias: Tensor | None,  # [B, K] or [1, K]
    residual: Tensor | None,  # [B, K, H', W']
    output_scale: float,
    algorithm: str | None,
) -> Tensor:  # [B, K, H', W']
    z = prologue(x, skip, num_groups, norm_weight, norm_bias, eps, mean, rstd, activation, upsample_size)
    left, right, top, bottom = padding
    if left != right or top != bottom:
        z, left, top = F.pad(z, (left, right, top, bottom)), 0, 0
    y = F.conv2d(z, weight, None if bias is None else bias.to(z.dtype), stride, (top, left))
    return epilogue(y, channel_bias, residual, output_scale)


def prologue(
    x: Tensor,
    skip: Tensor | None,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor | None,
    activation: str,
    upsample_size: Sequence[int] | None,
) -> Tensor:  # [B, C, *upsample_size]
    """What is convolved: the arguments are those of :func:`conv2d`."""
    z = x if skip is None else torch.cat([x, skip], dim=1)
    if num_groups:
        z = _normalise(z, num_groups, norm_weight, norm_bias, eps, mean, rstd)
    if activation == "silu":
        z = F.silu(z)
    return z if upsample_size is None else F.interpolate(z, size=tuple(upsample_size), mode="nearest")


def epilogue(y: Tensor, channel_bias: Tensor | None, residual: Tensor | None, output_scale: float) -> Tensor:
    """What becomes of the convolution's result: the arguments are those of :func:`conv2d`."""
    if channel_bias is not None:
        y = y + channel_bias.to(y.dtype)[:, :, None, None]
    if residual is not None:
        y = y + residual
    return y if output_scale == 1.0 else y * output_scale


def _normalise(
    z: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> Tensor:
    per_sample = any(p is not None and p.dim() == 2 for p in (weight, bias))
    weight, bias = (None if p is None else p.to(z.dtype) for p in (weight, bias))
    if mean is None and not per_sample:
        # contiguous: torch's channels_last kernel for the CPU loses a variance beside a large mean
        return torch.group_norm(z.contiguous(), num_groups, weight, bias, eps)
    if mean is None:
        z = torch.group_norm(z.contiguous(), num_groups, None, None, eps)
    else:
        assert rstd is not None  # the op's check has seen to it
        groups = z.unflatten(1, (num_groups, -1))
        mean, rstd = (s.to(z.dtype).reshape(*s.shape, 1, 1, 1) for s in (mean, rstd))
        z = ((groups - mean) * rstd).reshape(z.shape)
    if weight is not None:
        z = z * weight[..., None, None]
    return z if bias is None else z + bias[..., None, None]


def unavailable() -> str | None:
    return None


def reject(*args: Any) -> str | None:
    return None


def run(x: Tensor, *args: Any) -> Tensor:
    return dense(conv2d(x, *args), is_channels_last(x))
