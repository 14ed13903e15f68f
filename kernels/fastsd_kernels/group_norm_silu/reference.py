"""group_norm_silu as its definition: plain PyTorch, in any floating-point dtype."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels.layout import dense, is_channels_last


def group_norm_silu(
    x: Tensor,  # [B, C1, *S]
    num_groups: int,
    weight: Tensor | None,  # [C], C = C1 + C2
    bias: Tensor | None,  # [C]
    eps: float,
    activation: str,
    channel_bias: Tensor | None,  # [B, C] or [1, C]
    skip: Tensor | None,  # [B, C2, *S]
) -> Tensor:  # [B, C, *S]
    z = x if skip is None else torch.cat([x, skip], dim=1)
    if channel_bias is not None:
        z = z + channel_bias.to(z.dtype).reshape(*channel_bias.shape, *[1] * (z.dim() - 2))
    weight, bias = (None if p is None else p.to(z.dtype) for p in (weight, bias))
    # contiguous: torch's channels_last kernel for the CPU takes E[x²] − mean², and loses a variance beside a large mean
    y = torch.group_norm(z.contiguous(), num_groups, weight, bias, eps)
    return F.silu(y) if activation == "silu" else y


def group_norm_silu_backward(
    grad: Tensor,  # [B, C, *S]
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    channel_bias: Tensor | None,
    skip: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients to ``x, weight, bias, channel_bias, skip``, in float32 or wider, themselves differentiable.

    With u = ẑ·w + b, y = u·σ(u): ∂u = ∂y·σ(u)(1 + u(1 − σ(u))), ∂ẑ = ∂u·w and, over the n elements of a group,
    ∂z = (∂ẑ − mean(∂ẑ) − ẑ·mean(∂ẑ·ẑ)) / std.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = (x if skip is None else torch.cat([x, skip], dim=1)).to(dtype)
    batch, channels, *spatial = z.shape
    per_channel = (1, channels, *[1] * len(spatial))
    if channel_bias is not None:
        z = z + channel_bias.to(dtype).reshape(-1, *per_channel[1:])

    grouped = (batch, num_groups, channels // num_groups * math.prod(spatial))
    groups = z.reshape(grouped)
    mean = groups.mean(2, keepdim=True)
    rstd = torch.rsqrt((groups - mean).square().mean(2, keepdim=True) + eps)
    z_hat = ((groups - mean) * rstd).reshape(z.shape)
    u = z_hat if weight is None else z_hat * weight.to(dtype).reshape(per_channel)
    u = u if bias is None else u + bias.to(dtype).reshape(per_channel)

    grad_u = grad.to(dtype)
    if activation == "silu":
        gate = torch.sigmoid(u)
        grad_u = grad_u * gate * (1 + u * (1 - gate))
    over_batch_and_space = [0, *range(2, z.dim())]
    grad_weight = None if weight is None else (grad_u * z_hat).sum(over_batch_and_space).to(weight.dtype)
    grad_bias = None if bias is None else grad_u.sum(over_batch_and_space).to(bias.dtype)

    grad_hat = grad_u if weight is None else grad_u * weight.to(dtype).reshape(per_channel)
    grad_hat, z_hat = grad_hat.reshape(grouped), z_hat.reshape(grouped)
    grad_z = grad_hat - grad_hat.mean(2, keepdim=True) - z_hat * (grad_hat * z_hat).mean(2, keepdim=True)
    grad_z = (grad_z * rstd).reshape(z.shape)

    grad_channel_bias = None
    if channel_bias is not None:
        grad_channel_bias = grad_z.flatten(2).sum(2) if spatial else grad_z
        grad_channel_bias = grad_channel_bias.sum_to_size(channel_bias.shape).to(channel_bias.dtype)
    grad_x = grad_z[:, : x.shape[1]].to(x.dtype)
    grad_skip = None if skip is None else grad_z[:, x.shape[1] :].to(skip.dtype)
    return grad_x, grad_weight, grad_bias, grad_channel_bias, grad_skip


def unavailable() -> str | None:
    return None


def reject(*args: Any) -> str | None:
    return None


def run(x: Tensor, *args: Any) -> Tensor:
    return dense(group_norm_silu(x, *args), is_channels_last(x))
