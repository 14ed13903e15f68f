"""The CPU backend; ``"mix_in_loop"`` in C++ (``csrc/cpu/conv2d.cpp``), the others as calls of conv2d.

With routing, the pass that normalises and activates the map takes the mean of each channel on the way; what follows
then reads its result. Without, norm and activation are part of the convolution.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsd_kernels import cpu_memory, cpu_runtime
from fastsd_kernels.cond_conv2d.reference import mixing_weights
from fastsd_kernels.conv2d import cpu_costs
from fastsd_kernels.conv2d import cpu_impl as conv2d
from fastsd_kernels.conv2d.reference import prologue
from fastsd_kernels.conv2d.sizes import TILES
from fastsd_kernels.layout import dense, empty_map, is_channels_last, output_size


def unavailable() -> str | None:
    return cpu_runtime.unavailable()


def reject(x: Tensor, *args: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}; the cpu backend needs CPU tensors"
    if x.dtype not in conv2d.DTYPES:
        return f"x is {x.dtype}; the cpu backend takes float16, bfloat16 and float32"
    return None


def run(
    x: Tensor,  # [B, C1, H, W]
    experts: Tensor,  # [E, K, C, R, R]
    expert_biases: Tensor | None,  # [E, K]
    alpha: Tensor | None,  # [B, E] or [1, E]
    routing_weight: Tensor | None,  # [E, C]
    routing_bias: Tensor | None,  # [E]
    routing: str,
    stride: int,
    padding: Sequence[int],  # left, right, top, bottom
    skip: Tensor | None,  # [B, C2, H, W]
    num_groups: int,
    norm_weight: Tensor | None,  # [C] or [B, C]
    norm_bias: Tensor | None,  # [C] or [B, C]
    eps: float,
    activation: str,
    channel_bias: Tensor | None,  # [B, K] or [1, K]
    residual: Tensor | None,  # [B, K, H', W']
    output_scale: float,
    strategy: str | None,
) -> Tensor:
    out_size = output_size(x.shape[2:], experts.shape[3], stride, padding)
    if x.shape[0] == 0:
        return empty_map(x, experts.shape[1], is_channels_last(x), out_size)
    channels_last = is_channels_last(x)
    norm: tuple[Any, ...] = (num_groups, norm_weight, norm_bias, eps, None, None)
    if routing_weight is None:
        assert alpha is not None  # the op's check has seen to it
        weights = alpha.float().expand(x.shape[0], -1)
    else:
        x, mean = _activated(x, skip, norm, activation)
        skip, norm, activation = None, (0, None, None, eps, None, None), "none"
        weights = mixing_weights(mean, alpha, routing_weight, routing_bias, routing)
    rows = channel_bias
    if expert_biases is not None:
        rows = weights @ expert_biases.float()
        rows = rows if channel_bias is None else rows + channel_bias.float()
    strategy = strategy or ("mix_in_loop" if x.dtype == torch.float32 and conv2d.is_plain_float32() else "mix_first")
    prepared = (x, experts, weights, stride, padding, skip, norm, activation, rows, residual, output_scale)
    return dense(_STRATEGIES[strategy](*prepared, out_size), channels_last)


def _activated(x: Tensor, skip: Tensor | None, norm: tuple[Any, ...], activation: str) -> tuple[Tensor, Tensor]:
    """What is convolved, channels last, and the mean of each of its channels, ``[B, C]`` in float32."""
    num_groups, weight, bias, eps, *_ = norm
    if num_groups and all(p is None or p.dim() == 1 for p in (weight, bias)):
        x, skip = dense(x, True), None if skip is None else dense(skip, True)
        channels = x.shape[1] + (0 if skip is None else skip.shape[1])
        u = empty_map(x, channels, True, empty=cpu_memory.empty_permuted)
        mean = x.new_empty(u.shape[:2], dtype=torch.float32)
        weight, bias = (None if p is None else p.float().contiguous() for p in (weight, bias))
        torch.ops.fastsd_cpu.group_norm_silu_mean.default(
            x, skip, weight, bias, num_groups, eps, activation == "silu", cpu_runtime.isa(), u, mean
        )
        return u, mean
    u = _convolved(x, skip, norm, activation)
    return u, u.mean(dim=(2, 3), dtype=torch.float32)


def _convolved(x: Tensor, skip: Tensor | None, norm: tuple[Any, ...], activation: str) -> Tensor:
    num_groups, weight, bias, eps, mean, rstd = norm
    return dense(prologue(x, skip, num_groups, weight, bias, eps, mean, rstd, activation, None), True)


def _mix_in_loop(
    x: Tensor,  # [B, C1, H, W]
    experts: Tensor,  # [E, K, C, R, R]
    weights: Tensor,  # [B, E], float32
    stride: int,
    padding: Sequence[int],
    skip: Tensor | None,
    norm: tuple[Any, ...],
    activation: str,
    channel_bias: Tensor | None,  # [B, K] or [1, K]
    residual: Tensor | None,
    output_scale: float,
    out_size: tuple[int, int],
) -> Tensor:
    _, out_channels, channels, kernel, _ = experts.shape
    call = cpu_costs.Call(x.shape[0], channels, out_channels, *out_size, kernel, stride, 0)
    tile = TILES[cpu_costs.cheapest(call, but=["direct"])]  # mixing costs all about the same
    geometry = (out_channels, kernel, stride, padding, x.shape[2:], out_size)
    surroundings = (activation, None, channel_bias, residual, output_scale)
    return conv2d.multiply(x, experts.contiguous(), tile, *geometry, skip, norm, *surroundings, weights.contiguous())


def _mix_first(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    stride: int,
    padding: Sequence[int],
    skip: Tensor | None,
    norm: tuple[Any, ...],
    activation: str,
    channel_bias: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    out_size: tuple[int, int],
) -> Tensor:
    kernels = torch.tensordot(weights.to(experts.dtype), experts, dims=1)
    num_groups, norm_weight, norm_bias, eps, mean, rstd = norm

    def of(tensor: Tensor | None, sample: int, shared_dim: int | None = None) -> Tensor | None:
        """The sample's part of a tensor, or all of one that all samples share."""
        if tensor is None or tensor.dim() == shared_dim or tensor.shape[0] == 1:
            return tensor
        return tensor[sample : sample + 1]

    def convolve(b: int) -> Tensor:
        of_norm = (num_groups, of(norm_weight, b, 1), of(norm_bias, b, 1), eps, mean, rstd)
        behind = (of(channel_bias, b), of(residual, b), output_scale)
        inputs = (x[b : b + 1], kernels[b], None, stride, padding, of(skip, b))
        return conv2d.run(*inputs, *of_norm, activation, None, *behind, None)

    return torch.cat([convolve(b) for b in range(x.shape[0])])


def _concat(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    stride: int,
    padding: Sequence[int],
    skip: Tensor | None,
    norm: tuple[Any, ...],
    activation: str,
    channel_bias: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    out_size: tuple[int, int],
) -> Tensor:
    u = _convolved(x, skip, norm, activation)
    # [B, E·C, H, W] and [K, E·C, R, R]
    weighted = torch.cat([u * weight.to(u.dtype)[:, None, None, None] for weight in weights.unbind(1)], dim=1)
    kernels = experts.transpose(0, 1).flatten(1, 2)
    no_norm = (0, None, None, 0.0, None, None)
    surroundings = ("none", None, channel_bias, residual, output_scale, None)
    return conv2d.run(weighted, kernels, None, stride, padding, None, *no_norm, *surroundings)


_STRATEGIES = {"mix_in_loop": _mix_in_loop, "mix_first": _mix_first, "concat": _concat}
