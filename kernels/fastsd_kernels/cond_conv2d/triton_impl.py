"""cond_conv2d in Triton: conv2d's launches behind up to five more, without atomics.

With routing: statistics and coefficients of the norm, then one pass that activates the map and sums it up, as its mean
is needed before the first weight is known; the convolution reads that map. Without routing the norm stays in the
convolution. Then the weights of the mixture with what it adds to the result's channels, and for ``"mix_first"`` the
mixed kernels of each sample, or of all where all have the same ``alpha``.

Copies that are made where the layout is another are those of conv2d. A model in ``torch.channels_last`` has 4-D weights
in that layout, not the 5-D experts: keep them as ``[E, K, R, R, C]``, permuted, or they are copied at each call.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsd_kernels import triton_runtime
from fastsd_kernels.conv2d import triton_impl as conv2d
from fastsd_kernels.layout import dense, empty_map, is_channels_last, output_size
from fastsd_kernels.triton_runtime import Launch, ceil_div, ceil_power_of_2, contiguous, row_stride, unavailable

if triton_runtime.triton is not None:
    from fastsd_kernels.cond_conv2d import triton_kernels as kernels

__all__ = ["chosen", "launches", "reject", "run", "unavailable"]

# Experts that a program keeps apart in its registers: of a step of the convolution, or of its part of the weights
MOST_EXPERTS = 8
# What a card does while it moves a byte, for chosen(): multiplications on tensor cores, those in float32, and weights
# mixed inside the convolution, whose tiles have so many positions. Guesses from an H100's data sheet, not measured
PRODUCTS_A_BYTE, FLOAT32_PRODUCTS_A_BYTE, MIXED_A_BYTE, TILE_POSITIONS = 100, 10, 2, 128
# A tile of the activation; fewer positions where there are fewer programs than multiprocessors
ACTIVATE_S, ACTIVATE_C, ACTIVATE_WARPS = 64, 64, 4
FEWEST_S, FEWEST_PROGRAMS = 8, 132
# Channels and tiles whose sums routing adds up in one step, channels whose bias it mixes; fewer of many experts
ROUTE_C, ROUTE_T, ROUTE_K, ROUTE_LANES, ROUTE_WARPS = 256, 16, 256, 4096, 8
# Weights of a program that mixes: 16 bytes a thread of two-byte elements
MIX_BLOCK, MIX_WARPS = 1024, 4


def chosen(
    batch: int,
    mixtures: int,  # 1 where all samples share alpha, else batch
    count: int,  # of experts
    weights: int,  # of one expert
    positions: int,  # of the result
    itemsize: int,
) -> str:
    """The strategy that ``None`` stands for: the one that moves and computes least; a guess, see the constants.

    To mix first reads the experts, and writes and reads the mixtures. The others read the experts alone, but mix them
    anew in each tile of positions, or multiply the map with each of them.
    """
    if count > MOST_EXPERTS:
        return "mix_first"
    products = batch * weights * positions / (PRODUCTS_A_BYTE if itemsize == 2 else FLOAT32_PRODUCTS_A_BYTE)
    read, mixed = itemsize * weights * count, count * weights * batch * ceil_div(positions, TILE_POSITIONS)
    costs = {
        "mix_first": read + 2 * itemsize * weights * mixtures + products,
        "mix_in_loop": read + products + mixed / MIXED_A_BYTE,
        "concat": read + count * products,
    }
    return min(costs, key=costs.__getitem__)


def launches(
    x: Tensor,  # [B, C1, H, W]
    experts: Tensor,  # [E, K, C, R, R], C = C1 + C2
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
) -> tuple[Tensor, tuple[Launch, ...]]:
    """The result, uninitialised, and the launches that fill it in order. Tensors may be on ``meta``."""
    batch, (count, out_channels, _, kernel, _) = x.shape[0], experts.shape
    out_size = output_size(x.shape[2:], kernel, stride, padding)
    y = empty_map(x, out_channels, is_channels_last(x), out_size)
    if y.numel() == 0:
        return y, ()

    x, skip = conv2d.sources(x, skip)
    coefficients, steps = None, list[Launch]()
    if num_groups:
        norm = (num_groups, norm_weight, norm_bias, eps, None, None)
        coefficients, steps = conv2d.norm_coefficients(x, skip, *norm)
    size, sums = x.shape[2:], None
    if routing_weight is not None:
        u, sums, activate = _activation(x, skip, coefficients, activation)
        steps.append(activate)
        if u is not None:
            x, skip, coefficients, activation = u, None, None, "none"
    shared = routing_weight is None and alpha is not None and alpha.shape[0] == 1
    mixtures = 1 if shared else batch
    routed = (sums, size.numel(), routing_weight, routing_bias, routing == "softmax")
    weights, channel_bias, more = _mixing_weights(*routed, alpha, expert_biases, channel_bias, mixtures, experts)
    steps += more

    strategy = strategy or chosen(batch, mixtures, count, experts[0].numel(), y.shape[2:].numel(), x.itemsize)
    weight, in_loop = experts, None if strategy == "mix_first" else weights[:mixtures]
    if in_loop is None:
        weight, mix = _mixed(experts, weights, mixtures)
        weight = weight[0] if shared else weight
        steps.append(mix)
    surroundings = (coefficients, activation, None, channel_bias, residual, output_scale)
    more, _ = conv2d.convolution(
        x, skip, weight, None, stride, padding, *surroundings, y, alpha=in_loop, concat=strategy == "concat"
    )
    return y, (*steps, *more)


def _activation(
    x: Tensor,  # [B, C1, H, W], from sources
    skip: Tensor | None,  # [B, C2, H, W], from sources
    coefficients: Tensor | None,  # [B, 3, C], of the norm
    activation: str,
) -> tuple[Tensor | None, Tensor, Launch]:
    """The activated map and its sums ``[B, tiles, C]``, uninitialised, and the launch that fills them.

    Without norm and activation there is no other map than ``x`` and ``skip``.
    """
    batch, x_channels, height, width = x.shape
    skip_channels, positions = 0 if skip is None else skip.shape[1], height * width
    channels, x_tiles = x_channels + skip_channels, ceil_div(x_channels, ACTIVATE_C)
    column_tiles, block_s = x_tiles + ceil_div(skip_channels, ACTIVATE_C), ACTIVATE_S
    while block_s > FEWEST_S and batch * ceil_div(positions, block_s) * column_tiles < FEWEST_PROGRAMS:
        block_s //= 2
    row_tiles = ceil_div(positions, block_s)
    u = None
    if coefficients is not None or activation != "none":
        u = empty_map(x, channels, True)
    sums = x.new_empty((batch, row_tiles, channels), dtype=torch.float32)
    args = (
        *(x, skip, coefficients, u, sums, x_channels, skip_channels, positions, row_tiles, x_tiles, column_tiles),
        *(activation == "silu", block_s, ACTIVATE_C),
    )
    return u, sums, Launch(kernels.activate, (batch * row_tiles * column_tiles,), args, ACTIVATE_WARPS)


def _mixing_weights(
    sums: Tensor | None,  # [B, tiles, C], of what is convolved; None without routing
    positions: int,
    routing_weight: Tensor | None,  # [E, C]
    routing_bias: Tensor | None,  # [E]
    softmax: bool,
    alpha: Tensor | None,  # [B, E] or [1, E]
    expert_biases: Tensor | None,  # [E, K]
    channel_bias: Tensor | None,  # [B, K] or [1, K]
    mixtures: int,
    experts: Tensor,  # [E, K, C, R, R]
) -> tuple[Tensor, Tensor | None, list[Launch]]:
    """The weights of the mixtures, what is added to each channel, and the launch that fills both, if one is needed.

    There are ``mixtures`` rows of weights, or more that are equal.
    """
    if sums is None and expert_biases is None and alpha is not None and alpha.dtype is torch.float32:
        return alpha.contiguous(), channel_bias, []
    samples = max(mixtures, 1 if channel_bias is None or expert_biases is None else channel_bias.shape[0])
    count, out_channels = experts.shape[:2]
    weights = experts.new_empty((samples, count), dtype=torch.float32)
    rows = None if expert_biases is None else weights.new_empty((samples, out_channels))
    channels, tiles = (1, 1) if sums is None else (sums.shape[2], sums.shape[1])
    block_e = ceil_power_of_2(count)
    most = max(ROUTE_LANES // block_e, 1)
    args = (
        *(sums, *map(contiguous, (routing_weight, routing_bias, alpha, expert_biases, channel_bias)), weights, rows),
        *(row_stride(alpha), row_stride(channel_bias), channels, out_channels, positions, tiles, count, softmax),
        *(block_e, min(ROUTE_C, most), ROUTE_T, min(ROUTE_K, most)),
    )
    steps = [Launch(kernels.route, (samples,), args, ROUTE_WARPS)]
    return weights, channel_bias if rows is None else rows, steps


def _mixed(
    experts: Tensor,  # [E, K, C, R, R]
    alpha: Tensor,  # [mixtures, E] or more rows, float32
    mixtures: int,
) -> tuple[Tensor, Launch]:
    """The kernels ``[mixtures, K, C, R, R]``, uninitialised, and the launch that fills them."""
    count, out_channels, channels, kernel, _ = experts.shape
    mixed = experts.new_empty((mixtures, out_channels, kernel, kernel, channels))
    numel = mixed[0].numel()
    blocks = ceil_div(numel, MIX_BLOCK)
    # all samples in one program, unless there are few programs
    samples_per_program = ceil_div(mixtures, max(FEWEST_PROGRAMS // blocks, 1))
    args = (
        *(dense(experts.flatten(0, 1), True), alpha, mixed, numel, mixtures, blocks, samples_per_program),
        *(count, min(ceil_power_of_2(count), MOST_EXPERTS), MIX_BLOCK),
    )
    grid = (blocks * ceil_div(mixtures, samples_per_program),)
    return mixed.movedim(-1, 2), Launch(kernels.mix, grid, args, MIX_WARPS)


def reject(
    x: Tensor,
    experts: Tensor,
    expert_biases: Tensor | None,
    alpha: Tensor | None,
    routing_weight: Tensor | None,
    routing_bias: Tensor | None,
    routing: str,
    stride: int,
    padding: Sequence[int],
    skip: Tensor | None,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    channel_bias: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    strategy: str | None,
) -> str | None:
    if strategy in ("mix_in_loop", "concat") and experts.shape[0] > MOST_EXPERTS:
        return (
            f"the Triton backend takes up to {MOST_EXPERTS} experts with strategy={strategy!r}; "
            f"got {experts.shape[0]}; use strategy='mix_first'"
        )
    return triton_runtime.reject(
        x,
        expert_biases=expert_biases,
        alpha=alpha,
        routing_weight=routing_weight,
        routing_bias=routing_bias,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        channel_bias=channel_bias,
    )


def run(x: Tensor, *args: Any) -> Tensor:
    y, steps = launches(x, *args)
    triton_runtime.run(x, steps)
    return y
