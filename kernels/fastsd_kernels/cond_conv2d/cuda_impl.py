"""The CUDA C++ backend, ``strategy="mix_first"``; kernels in ``csrc/cuda/cond_conv2d.cu``.

The convolution is conv2d's implicit_gemm with weights of each sample, or of all where all have the same ``alpha``. With
routing, one pass before it activates the map and sums it up, as its mean is needed before the first weight is known;
the convolution reads that map. Without routing the norm stays in the convolution.

It works on channels-last maps, and copies others as conv2d does. Experts are read as ``[E, K, R·R, C]``: keep them so,
permuted, or they are copied at each call.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsd_kernels import cuda_runtime
from fastsd_kernels.conv2d import cuda_impl as conv2d
from fastsd_kernels.cuda_runtime import ELEMENTS, VECTOR_BYTES, Launch, alignment, of_one_dtype
from fastsd_kernels.layout import dense, empty_map, is_channels_last, output_size

SOURCE = "cond_conv2d.cu"
STRATEGY = "mix_first"
DTYPES = conv2d.DTYPES

_THREADS = 256
_COLUMNS = 8  # of a tile of the activation, each of one access's channels
_ROWS = _THREADS // _COLUMNS
_BLOCKS_PER_MULTIPROCESSOR = 3
_HELD = 8  # experts that a thread keeps in registers

unavailable = cuda_runtime.unavailable


@dataclass(frozen=True)
class Plan:
    """The launches around the convolution."""

    defines: tuple[str, ...]
    activate: Launch
    route: Launch
    mix: Launch
    chunk: int  # positions
    chunks: int
    samples_per_block: int  # that mixes


@functools.lru_cache(maxsize=1024)
def plan(
    *,
    batch: int,
    x_channels: int,
    skip_channels: int,
    space: int,
    count: int,
    weights: int,
    mixtures: int,
    rows: int,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    alignment: int,
    expert_alignment: int,
    multiprocessors: int,
) -> Plan:
    """The launches for maps of ``x_channels + skip_channels`` channels and ``space`` positions, none of them empty.

    Args:
        count: experts. weights: of one of them.
        mixtures: of kernels: one, or one for each sample.
        rows: of mixing weights, at least as many as mixtures.
        alignment: bytes that the addresses of x, skip and u are a multiple of.
        expert_alignment: the same of experts and mixtures.
        multiprocessors: of the card; the grids are made wide enough for all of them.
    """

    def vector(alignment: int, *extents: int) -> int:
        return math.gcd(alignment // dtype.itemsize, VECTOR_BYTES // dtype.itemsize, *extents)

    map_vector, mix_vector = vector(alignment, x_channels, skip_channels), vector(expert_alignment, weights)
    blocks = _BLOCKS_PER_MULTIPROCESSOR * multiprocessors
    tiles = batch * math.ceil((x_channels + skip_channels) / (_COLUMNS * map_vector))
    chunk = math.ceil(space / min(math.ceil(blocks / tiles), math.ceil(space / _ROWS)))
    chunks = math.ceil(space / chunk)
    # all samples in one block, unless there are few blocks
    mix_blocks = math.ceil(weights / mix_vector / _THREADS)
    samples_per_block = math.ceil(mixtures / max(blocks // mix_blocks, 1))
    block = (_THREADS, 1, 1)
    return Plan(
        defines=(
            f"DTYPE={ELEMENTS[dtype]}",
            f"PARAMETER_DTYPE={ELEMENTS[parameter_dtype]}",
            f"VECTOR={map_vector}",
            f"MIX_VECTOR={mix_vector}",
            f"HELD={min(count, _HELD)}",
        ),
        activate=Launch("cond_conv2d_activate", (tiles * chunks, 1, 1), block, 4 * _THREADS * map_vector),
        route=Launch("cond_conv2d_route", (rows, 1, 1), block, 0),
        mix=Launch("cond_conv2d_mix", (mix_blocks * math.ceil(mixtures / samples_per_block), 1, 1), block, 0),
        chunk=chunk,
        chunks=chunks,
        samples_per_block=samples_per_block,
    )


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
    *args: Any,
) -> str | None:
    strategy = args[-1]
    if x.device.type != "cuda":
        return f"x is on {x.device}; the cuda backend needs CUDA tensors"
    if x.dtype not in DTYPES:
        return (
            f"x is {x.dtype}; the cuda backend takes float16 and bfloat16, as tensor cores would round others to 10 "
            "bits; use backend='triton'"
        )
    if strategy not in (None, STRATEGY):
        return f"strategy is {strategy!r}; the cuda backend has {STRATEGY!r}; use backend='triton'"
    size = output_size(x.shape[2:], experts.shape[3], stride, padding)
    return conv2d.reject_size(x.shape[0], experts.shape[2], experts.shape[1], stride, size)


def run(x: Tensor, *args: Any) -> Tensor:
    return compute(cuda_runtime.launch, cuda_runtime.multiprocessors(x.device), x, *args[:-1])


def compute(
    launch: Callable[..., None],
    multiprocessors: int,
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
) -> Tensor:  # [B, K, H', W']
    """The op through ``launch``, which is :func:`fastsd_kernels.cuda_runtime.launch` or works as it does."""
    batch, x_channels, height, width = x.shape
    count, out_channels, channels, kernel, _ = experts.shape
    channels_last, space = is_channels_last(x), height * width
    if batch == 0:
        return empty_map(x, out_channels, channels_last, output_size((height, width), kernel, stride, padding))

    x, skip = dense(x, True), None if skip is None else dense(skip, True)
    kernels = experts.flatten(3).movedim(2, 3).contiguous()  # [E, K, R·R, C]
    shared = routing_weight is None and alpha is not None and alpha.shape[0] == 1
    mixtures = 1 if shared else batch
    # those of several samples may differ in channel_bias alone
    rows = mixtures if channel_bias is None or expert_biases is None else max(mixtures, channel_bias.shape[0])
    parameters = of_one_dtype(routing_weight, routing_bias, alpha, expert_biases, channel_bias)
    routing_weight, routing_bias, given, expert_biases, mixed_bias = parameters
    mixed = kernels.new_empty((mixtures, *kernels.shape[1:]))
    activates = routing_weight is not None and (num_groups > 0 or activation != "none")
    u = empty_map(x, channels, True) if activates else None
    p = plan(
        batch=batch,
        x_channels=x_channels,
        skip_channels=channels - x_channels,
        space=space,
        count=count,
        weights=kernels[0].numel(),
        mixtures=mixtures,
        rows=rows,
        dtype=x.dtype,
        parameter_dtype=next(p.dtype for p in parameters if p is not None),
        alignment=alignment(x, skip, u),
        expert_alignment=alignment(kernels, mixed),
        multiprocessors=multiprocessors,
    )

    start = functools.partial(conv2d.start_on, launch, x.device)
    norm = (num_groups, norm_weight, norm_bias, eps)
    sums = None
    if routing_weight is not None:
        coefficients = _coefficients(start, multiprocessors, x, skip, *norm) if num_groups else None
        sums = x.new_empty((batch, p.chunks, channels), dtype=torch.float32)
        sizes = [x_channels, channels - x_channels, space, p.chunk, p.chunks, int(activation == "silu")]
        start(SOURCE, p.activate, p.defines, [x, skip, coefficients, u, sums, *sizes])
        if u is not None:
            x, skip, norm, activation = u, None, (0, None, None, eps), "none"

    weights = x.new_empty((rows, count), dtype=torch.float32)
    added = None if expert_biases is None else x.new_empty((rows, out_channels), dtype=torch.float32)
    strides = [0 if q is None or q.shape[0] == 1 else q.shape[1] for q in (given, mixed_bias)]
    tensors = [sums, routing_weight, routing_bias, given, expert_biases, mixed_bias, weights, added]
    sizes = [channels, out_channels, space, p.chunks, count, *strides, int(routing == "softmax")]
    start(SOURCE, p.route, p.defines, [*tensors, *sizes])
    sizes = [kernels[0].numel(), mixtures, count, p.samples_per_block]
    start(SOURCE, p.mix, p.defines, [kernels, weights, mixed, *sizes])

    weight = mixed.movedim(3, 2).unflatten(3, (kernel, kernel))
    surroundings = (None, None, activation, None, channel_bias if added is None else added, residual, output_scale)
    y, _ = conv2d.convolve(
        *(launch, multiprocessors, x, weight[0] if shared else weight, None, stride, padding, skip),
        *(*norm, *surroundings),  # type: ignore[arg-type]
    )
    return dense(y, channels_last)


def _coefficients(
    start: Callable[..., None],
    multiprocessors: int,
    x: Tensor,  # [B, C1, H, W]
    skip: Tensor | None,  # [B, C2, H, W]
    num_groups: int,
    norm_weight: Tensor | None,  # [C] or [B, C]
    norm_bias: Tensor | None,  # [C] or [B, C]
    eps: float,
) -> Tensor:
    """Those of the norm, ``[B, 3, C']``."""
    norm_weight, norm_bias = of_one_dtype(norm_weight, norm_bias)
    # the kernel that merges them is the same in all variants of conv2d.cu: the smallest is compiled the fastest
    smallest = conv2d.plan(
        batch=x.shape[0],
        x_channels=8,
        skip_channels=0,
        num_groups=num_groups,
        kernel=1,
        stride=1,
        out_channels=8,
        out_height=1,
        out_width=1,
        dtype=x.dtype,
        parameter_dtype=next((p.dtype for p in (norm_weight, norm_bias) if p is not None), torch.float32),
        alignment=VECTOR_BYTES,
        out_alignment=VECTOR_BYTES,
        multiprocessors=multiprocessors,
    )
    return conv2d.norm_coefficients(start, multiprocessors, smallest, x, skip, num_groups, norm_weight, norm_bias, eps)
