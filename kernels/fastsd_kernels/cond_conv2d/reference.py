"""cond_conv2d as its definition: plain PyTorch, in any floating-point dtype."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels.conv2d.reference import epilogue, prologue
from fastsd_kernels.layout import dense, is_channels_last


def cond_conv2d(
    x: Tensor,  # [B, C1, H, W]
    experts: Tensor,  # [E, K, C, R, R], C = C1 + C2, R = 1 or 3
    expert_biases: Tensor | None,  # [E, K]
    alpha: Tensor | None,  # [B, E] or [1, E]
    routing_weight: Tensor | None,  # [E, C]
    routing_bias: Tensor | None,  # [E]
    routing: str,
    stride: int,
    padding: Sequence[int],  # left, right, top, bottom
    skip: Tensor | None,  # [B, C2, H, W]
    num_groups: int,  # 0: no normalisation
    norm_weight: Tensor | None,  # [C] or [B, C]
    norm_bias: Tensor | None,  # [C] or [B, C]
    eps: float,
    activation: str,
    channel_bias: Tensor | None,  # [B, K] or [1, K]
    residual: Tensor | None,  # [B, K, H', W']
    output_scale: float,
    strategy: str | None,
) -> Tensor:  # [B, K, H', W']
    u = prologue(x, skip, num_groups, norm_weight, norm_bias, eps, None, None, activation, None)
    weights = mixing_weights(u.mean(dim=(2, 3)), alpha, routing_weight, routing_bias, routing)
    bias = None if expert_biases is None else weights @ expert_biases.to(u.dtype)
    left, right, top, bottom = padding
    y = _convolve_each(F.pad(u, (left, right, top, bottom)), torch.tensordot(weights, experts, dims=1), stride)
    if bias is not None:
        y = y + bias[:, :, None, None]
    return epilogue(y, channel_bias, residual, output_scale)


def mixing_weights(
    mean: Tensor,  # [B, C], of what is convolved
    alpha: Tensor | None,  # [B, E] or [1, E]
    routing_weight: Tensor | None,  # [E, C]
    routing_bias: Tensor | None,  # [E]
    routing: str,
) -> Tensor:  # [B, E]
    """How much of each expert each sample gets: ``alpha + routing(R · mean + r)``, in ``mean``'s dtype."""
    total = None if alpha is None else alpha.to(mean.dtype).expand(mean.shape[0], -1)
    if routing_weight is None:
        assert total is not None  # the op's check has seen to it
        return total
    logits = mean @ routing_weight.to(mean.dtype).T
    logits = logits if routing_bias is None else logits + routing_bias.to(mean.dtype)
    routed = logits.sigmoid() if routing == "sigmoid" else logits.softmax(dim=1)
    return routed if total is None else total + routed


def _convolve_each(
    u: Tensor,  # [B, C, H, W]
    kernels: Tensor,  # [B, K, C, R, R]
    stride: int,
) -> Tensor:  # [B, K, H', W']
    """Each sample with its own kernel: one convolution of B groups."""
    batch, out_channels = kernels.shape[:2]
    if batch == 0:
        # no groups at all are refused
        return F.conv2d(u, kernels.new_zeros(kernels.shape[1:]), stride=stride) + kernels.sum()
    y = F.conv2d(u.reshape(1, -1, *u.shape[2:]), kernels.flatten(0, 1), stride=stride, groups=batch)
    return y.reshape(batch, out_channels, *y.shape[2:])


def unavailable() -> str | None:
    return None


def reject(*args: Any) -> str | None:
    return None


def run(x: Tensor, *args: Any) -> Tensor:
    return dense(cond_conv2d(x, *args), is_channels_last(x))
