"""What the kernels of cond_conv2d may cost.

Those that mix, activate and route wait for memory: 16 bytes a load and a store, and many threads, of which 80 registers
let a multiprocessor hold 768. The convolution of mixed weights is conv2d's, with its registers; in CUDA it is the very
kernel that conv2d's gates hold. In Triton one that mixes in its steps, or multiplies with each expert, may not lose a
resident block by it: two in 128 registers for tiles of 128 positions by 64 channels.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fastsd_kernels.cond_conv2d import cuda_impl, triton_impl
from tests.kernels.gates.conv2d import DTYPES
from tests.proving import triton_aot
from tests.proving.gates import COPY_16_BYTES, LOAD_16_BYTES, STORE_16_BYTES, TENSOR_CORES, Gate, cuda_cubin

SAMPLES, EXPERTS = 2, 3
# dtype, channels in and out, side, strategy, whether it is routed; then registers of the convolution
TRITON = (
    ("float16", 320, 64, "mix_first", True, 128),
    ("bfloat16", 640, 32, "mix_first", True, 208),
    ("float16", 1280, 16, "mix_first", False, 208),
    ("float16", 320, 64, "mix_in_loop", False, 128),
    ("float16", 640, 32, "mix_in_loop", True, 128),
    ("bfloat16", 1280, 16, "mix_in_loop", True, 128),
    ("float16", 320, 64, "concat", False, 128),
    ("float16", 1280, 16, "concat", True, 128),
    ("bfloat16", 1280, 8, "concat", True, 128),
)
# dtype, channels in and out, side
CUDA = (
    ("float16", 320, 64),
    ("bfloat16", 640, 32),
    ("float16", 1280, 16),
)


def gates() -> Iterator[Gate]:
    yield from _cuda_gates()
    yield from _triton_gates()


def triton_launches(
    dtype: str, channels: int, side: int, strategy: str | None, routed: bool, count: int = EXPERTS
) -> tuple[triton_impl.Launch, ...]:
    """The launches of one variant, its tensors on ``meta``: the second convolution of a residual block."""
    like: dict[str, Any] = {"device": "meta", "dtype": DTYPES[dtype]}
    x = torch.empty(SAMPLES, channels, side, side, **like, memory_format=torch.channels_last)
    return triton_impl.launches(
        x=x,
        experts=torch.empty(count, channels, 3, 3, channels, **like).movedim(-1, 2),
        expert_biases=torch.empty(count, channels, **like),
        alpha=torch.empty(1 if routed else SAMPLES, count, **like),
        routing_weight=torch.empty(count, channels, **like) if routed else None,
        routing_bias=torch.empty(count, **like) if routed else None,
        routing="sigmoid",
        stride=1,
        padding=[1] * 4,
        skip=None,
        num_groups=32,
        norm_weight=torch.empty(channels, **like),
        norm_bias=torch.empty(channels, **like),
        eps=1e-5,
        activation="silu",
        channel_bias=torch.empty(SAMPLES, channels, **like),
        residual=x,
        output_scale=1.0,
        strategy=strategy,
    )[1]


def _triton_gates() -> Iterator[Gate]:
    for variant in TRITON:
        *given, registers = variant
        dtype, channels, side, strategy, routed = given
        limits: dict[str, tuple[int, tuple[str, ...]]] = {
            "activate": (80, (LOAD_16_BYTES, STORE_16_BYTES)),
            "route": (64, (LOAD_16_BYTES,) if routed else ()),
            "mix": (64, (LOAD_16_BYTES, STORE_16_BYTES)),
            "convolve": (registers, (TENSOR_CORES, COPY_16_BYTES, STORE_16_BYTES)),
        }
        for launch in triton_launches(*given):
            kernel = launch.kernel.__name__
            if kernel in limits:
                limit, required = limits[kernel]
                yield Gate(
                    op="cond_conv2d",
                    backend="triton",
                    kernel=kernel,
                    variant=f"{dtype} {channels} {side}² {strategy}{' routed' if routed else ''}",
                    compile=partial(triton_aot.compile_launch, launch),
                    registers=limit,
                    required=required,
                )


def _cuda_gates() -> Iterator[Gate]:
    for dtype, channels, side in CUDA:
        plan = cuda_impl.plan(
            batch=SAMPLES,
            x_channels=channels,
            skip_channels=0,
            space=side * side,
            count=EXPERTS,
            weights=9 * channels * channels,
            mixtures=SAMPLES,
            rows=SAMPLES,
            dtype=DTYPES[dtype],
            parameter_dtype=DTYPES[dtype],
            alignment=16,
            expert_alignment=16,
            multiprocessors=132,
        )
        for launch, registers, required in (
            (plan.activate, 80, (LOAD_16_BYTES, STORE_16_BYTES)),
            (plan.route, 64, ()),
            (plan.mix, 64, (LOAD_16_BYTES, STORE_16_BYTES)),
        ):
            yield Gate(
                op="cond_conv2d",
                backend="cuda",
                kernel=launch.kernel,
                variant=f"{dtype} {channels} {side}²",
                compile=partial(cuda_cubin, cuda_impl.SOURCE, defines=plan.defines),
                registers=registers,
                required=required,
            )
