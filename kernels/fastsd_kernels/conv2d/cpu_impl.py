"""The CPU backend: products of matrices in C++ (``csrc/cpu/conv2d.cpp``), or torch's convolution where that wins."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels import cpu_memory, cpu_runtime
from fastsd_kernels.conv2d import composed, cpu_costs
from fastsd_kernels.conv2d.sizes import TILES
from fastsd_kernels.layout import dense, empty_map, is_channels_last, is_dense, output_size

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALGORITHMS = ("direct", "product", "winograd2", "winograd4")


def unavailable() -> str | None:
    return cpu_runtime.unavailable()


def reject(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, *args: Any) -> str | None:
    algorithm = args[-1]
    if x.device.type != "cpu":
        return f"x is on {x.device}; the cpu backend needs CPU tensors"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; the cpu backend takes float16, bfloat16 and float32"
    if algorithm is None or algorithm == "direct":
        return None
    if algorithm not in ALGORITHMS:
        return f"algorithm is {algorithm!r}; the cpu backend has {', '.join(ALGORITHMS)}"
    if algorithm.startswith("winograd") and stride != 1:
        return f"stride is {stride}; {algorithm} takes stride 1, use algorithm='product'"
    if algorithm.startswith("winograd") and weight.shape[2] != 3:
        return f"weight is {tuple(weight.shape)}; {algorithm} takes 3×3 kernels"
    return None


def run(
    x: Tensor,  # [B, C1, H, W]
    weight: Tensor,  # [K, C, R, R]
    bias: Tensor | None,  # [K]
    stride: int,
    padding: Sequence[int],  # left, right, top, bottom
    skip: Tensor | None,  # [B, C2, H, W]
    num_groups: int,
    norm_weight: Tensor | None,  # [C] or [B, C]
    norm_bias: Tensor | None,  # [C] or [B, C]
    eps: float,
    mean: Tensor | None,  # [B, num_groups]
    rstd: Tensor | None,  # [B, num_groups]
    activation: str,
    upsample_size: Sequence[int] | None,
    channel_bias: Tensor | None,  # [B, K] or [1, K]
    residual: Tensor | None,  # [B, K, H', W']
    output_scale: float,
    algorithm: str | None,
) -> Tensor:
    size = x.shape[2:] if upsample_size is None else upsample_size
    out_size = output_size(size, weight.shape[2], stride, padding)
    call = _call(x, weight, stride, out_size, skip, num_groups, activation, residual)
    if algorithm is None:
        algorithm = _choose(x, call)
    norm = (num_groups, norm_weight, norm_bias, eps, mean, rstd)
    if algorithm == "direct" or call.is_empty:
        surroundings = (activation, upsample_size, channel_bias, residual, output_scale)
        return composed.run(x, weight, bias, stride, padding, skip, *norm, *surroundings)

    tile = TILES[algorithm]
    weights = weight if is_dense(weight, False) or is_dense(weight, True) else weight.contiguous()
    geometry = (weight.shape[0], call.kernel, stride, padding, size, out_size)
    behind = (bias, channel_bias, residual, output_scale)
    return multiply(x, weights, tile, *geometry, skip, norm, activation, *behind)


def multiply(
    x: Tensor,  # [B, C1, H, W]
    weights: Tensor,  # as csrc/cpu/conv2d.cpp reads them
    tile: int,
    out_channels: int,
    kernel: int,
    stride: int,
    padding: Sequence[int],
    size: Sequence[int],  # of the enlarged map
    out_size: tuple[int, int],
    skip: Tensor | None,
    norm: tuple[Any, ...],  # num_groups, weight, bias, eps, mean, rstd
    activation: str,
    bias: Tensor | None,  # [K]
    channel_bias: Tensor | None,  # [B, K] or [1, K]
    residual: Tensor | None,  # [B, K, H', W']
    output_scale: float,
    alpha: Tensor | None = None,  # [B, E], float32: weights are experts [E, K, C, R, R]
) -> Tensor:
    """The C++ kernel on a map that is not empty."""
    channels_last = is_channels_last(x)
    out = empty_map(x, out_channels, True, out_size, cpu_memory.empty_permuted)
    x = dense(x, True)
    skip = None if skip is None else dense(skip, True)
    left, _, top, _ = padding
    torch.ops.fastsd_cpu.conv2d.default(
        x,
        skip,
        _affine(x, skip, *norm) if norm[0] else None,
        activation == "silu",
        _source_map(x.shape[2], size[0], top, out_size[0], tile, kernel, stride),
        _source_map(x.shape[3], size[1], left, out_size[1], tile, kernel, stride),
        weights,
        tile,
        kernel,
        stride,
        _float32(bias),
        _float32(channel_bias),
        None if residual is None else dense(residual, True),
        output_scale,
        cpu_runtime.isa(),
        out,
        alpha,
    )
    return dense(out, channels_last)


def _call(
    x: Tensor,
    weight: Tensor,
    stride: int,
    out_size: tuple[int, int],
    skip: Tensor | None,
    num_groups: int,
    activation: str,
    residual: Tensor | None,
) -> cpu_costs.Call:
    batch, channels, kernel = x.shape[0], weight.shape[1], weight.shape[2]
    of_input, of_output = (
        4 * batch * channels * x.shape[2] * x.shape[3],
        4 * batch * weight.shape[0] * math.prod(out_size),
    )
    # a pass reads one map and writes another; where there is a norm, it reads the skip connection too
    passes = 2 * of_input if num_groups or activation != "none" or skip is not None else 0
    extra = passes + (3 * of_output if residual is not None else 0)
    return cpu_costs.Call(batch, channels, weight.shape[0], *out_size, kernel, stride, extra)


def _choose(x: Tensor, call: cpu_costs.Call) -> str:
    """The fastest algorithm by the model; torch's own where it has instructions that the kernels do not use."""
    if call.is_empty or x.dtype != torch.float32 or not is_plain_float32():
        return "direct"
    return cpu_costs.cheapest(call)


def is_plain_float32() -> bool:
    """Whether neither products of matrices nor convolutions may round float32 to less."""
    mkldnn: Any = torch.backends.mkldnn
    return {mkldnn.matmul.fp32_precision, mkldnn.conv.fp32_precision} <= {"none", "ieee"}


def _affine(
    x: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> Tensor:
    """Center, scale and offset of each channel, ``[B, 3, C]`` in float32: u = (z − center)·scale + offset."""
    batch, channels = x.shape[0], x.shape[1] + (0 if skip is None else skip.shape[1])
    affine = torch.empty((batch, 3, channels), dtype=torch.float32)
    weight, bias = _float32(weight), _float32(bias)
    if mean is None or rstd is None:
        isa = cpu_runtime.isa()
        torch.ops.fastsd_cpu.group_norm_affine.default(x, skip, weight, bias, num_groups, eps, isa, affine)
        return affine
    affine[:, 0], affine[:, 1] = (s.float().repeat_interleave(channels // num_groups, dim=1) for s in (mean, rstd))
    if weight is not None:
        affine[:, 1] *= weight
    affine[:, 2] = 0.0 if bias is None else bias
    return affine


@functools.lru_cache(maxsize=256)
def _source_map(size: int, enlarged: int, before: int, out: int, tile: int, kernel: int, stride: int) -> Tensor:
    """For each row (or column) that the tiles read, the one of the source that it is, −1 where there is padding."""
    # of float32, for which torch rounds the quotient of the sizes as it does for the maps that come here
    source = torch.arange(size, dtype=torch.float32)
    if enlarged != size:
        source = F.interpolate(source[None, None], size=enlarged, mode="nearest")[0, 0]
    read = (math.ceil(out / tile) * tile - 1) * stride + kernel
    result = torch.full((read,), -1, dtype=torch.int32)
    inside = max(0, min(enlarged, read - before))
    result[before : before + inside] = source[:inside].to(torch.int32)
    return result


def _float32(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.to(torch.float32).contiguous()
