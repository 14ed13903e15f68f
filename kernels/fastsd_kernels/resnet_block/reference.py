"""resnet_block as its definition: plain PyTorch, in any floating-point dtype."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels.conv2d.reference import conv2d
from fastsd_kernels.layout import dense, is_channels_last


def resnet_block(
    x: Tensor,  # [B, C1, H, W]
    conv1_weight: Tensor | None,  # [K, C, 3, 3], C = C1 + C2
    conv2_weight: Tensor | None,  # [K, K, 3, 3]
    conv1_bias: Tensor | None,  # [K]
    conv2_bias: Tensor | None,  # [K]
    skip: Tensor | None,  # [B, C2, H, W]
    num_groups: int,
    norm1_weight: Tensor | None,  # [C]
    norm1_bias: Tensor | None,  # [C]
    num_groups_out: int | None,
    norm2_weight: Tensor | None,  # [K] or [B, K]
    norm2_bias: Tensor | None,  # [K] or [B, K]
    eps: float,
    channel_bias: Tensor | None,  # [B, K] or [1, K]
    shortcut_weight: Tensor | None,  # [K, C, 1, 1]
    shortcut_bias: Tensor | None,  # [K]
    output_scale: float,
) -> Tensor:  # [B, K, H, W]
    z = x if skip is None else torch.cat([x, skip], dim=1)
    shortcut = z
    if shortcut_weight is not None:
        shortcut = F.conv2d(z, shortcut_weight, None if shortcut_bias is None else shortcut_bias.to(z.dtype))
    if conv1_weight is None or conv2_weight is None:
        return shortcut * output_scale
    h = _convolve(z, conv1_weight, conv1_bias, num_groups, norm1_weight, norm1_bias, eps, channel_bias=channel_bias)
    groups = num_groups if num_groups_out is None else num_groups_out
    norm2 = (groups, norm2_weight, norm2_bias, eps)
    return _convolve(h, conv2_weight, conv2_bias, *norm2, residual=shortcut, output_scale=output_scale)


def _convolve(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale: float = 1.0,
) -> Tensor:
    """``(weight ∗ silu(norm(z)) + bias + channel_bias + residual) · output_scale``"""
    norm = (num_groups, norm_weight, norm_bias, eps, None, None)
    epilogue = (channel_bias, residual, output_scale)
    return conv2d(z, weight, bias, 1, (1, 1, 1, 1), None, *norm, "silu", None, *epilogue, None)


def unavailable() -> str | None:
    return None


def reject(*args: Any) -> str | None:
    return None


def run(x: Tensor, *args: Any) -> Tensor:
    return dense(resnet_block(x, *args), is_channels_last(x))
