"""What the kernels of cond_conv2d may cost.

Those that mix, activate and route wait for memory: 16 bytes a load and a store, and many threads, of which 80 registers
let a multiprocessor hold 768. The convolution of mixed weights is conv2d's, with its registers; in CUDA it is the very
kernel that conv2d's gates hold. In Triton one that mixes in its steps, or multiplies with each expert, may not lose a
resident block by it: two in 128 registers for tiles of 128 positions by 64 channels.
"""

from collections.abc import Iterator
from typing import Any

import torch

from fastsd_kernels.cond_conv2d import cases, cuda_impl, op, triton_impl
from fastsd_kernels.testing import named
from fastsd_kernels.triton_runtime import Launch
from tests.budgets.cubin import COPY_16_BYTES, LOAD_16_BYTES, STORE_16_BYTES, TENSOR_CORES
from tests.budgets.gates import Gate
from tests.budgets.ops.conv2d import DTYPES
from tests.budgets.targets import TARGETS
from tests.budgets.triton_aot import compiling, gate, launches_of
from tests.budgets.units import Cuda

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
# strategy, side, experts: of float16, 1280 channels, not routed; the largest tiles in the smallest shared memory
TRITON_UNLIMITED = (
    ("mix_in_loop", 16, 3),
    ("mix_in_loop", 16, triton_impl.MOST_EXPERTS),
    ("concat", 16, 3),
    ("concat", 8, 3),
)
# shape of x, channels out, strategy
EXTREMES = (
    ((1, 1, 1, 1), 1, "mix_first"),
    ((1, 1, 1, 1), 1, "mix_in_loop"),
    ((2, 128, 1 << 12, 1 << 13), 1, "concat"),
    ((2, 1 << 14, 3, 3), 1 << 14, "mix_first"),
    ((2, 1 << 14, 3, 3), 1 << 14, "mix_in_loop"),
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
) -> list[Launch]:
    """The launches of one variant, its tensors on ``meta``: the second convolution of a residual block."""
    like: dict[str, Any] = {"device": "meta", "dtype": DTYPES[dtype]}
    x = torch.empty(SAMPLES, channels, side, side, **like, memory_format=torch.channels_last)
    return launches_of(
        op,
        x=x,
        experts=torch.empty(count, channels, 3, 3, channels, **like).movedim(-1, 2),
        expert_biases=torch.empty(count, channels, **like),
        alpha=torch.empty(1 if routed else SAMPLES, count, **like),
        routing_weight=torch.empty(count, channels, **like) if routed else None,
        routing_bias=torch.empty(count, **like) if routed else None,
        padding=1,
        num_groups=32,
        norm_weight=torch.empty(channels, **like),
        norm_bias=torch.empty(channels, **like),
        activation="silu",
        channel_bias=torch.empty(SAMPLES, channels, **like),
        residual=x,
        strategy=strategy,
    )


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
                text = f"{dtype} {channels} {side}² {strategy}{' routed' if routed else ''}"
                yield gate("cond_conv2d", launch, text, registers=limit, required=required)
    for strategy, side, count in TRITON_UNLIMITED:
        launches = triton_launches("float16", 1280, side, strategy, False, count)
        convolve = [launch for launch in launches if launch.kernel.__name__ == "convolve"]
        yield from compiling("cond_conv2d", f"{count} experts 1280 {side}² {strategy}", convolve)
    sample = named(cases.samples("cpu", torch.bfloat16), "everything_contiguous")
    yield from compiling("cond_conv2d", sample.name, launches_of(op, **sample.kwargs))
    for shape, out_channels, strategy in EXTREMES:
        x = torch.empty(shape, device="meta", dtype=torch.float16)
        launches = launches_of(
            op,
            x=x,
            experts=x.new_empty(2, out_channels, shape[1], 3, 3),
            expert_biases=x.new_empty(2, out_channels),
            routing_weight=x.new_empty(2, shape[1]),
            padding=1,
            num_groups=1,
            strategy=strategy,
        )
        yield from compiling("cond_conv2d", f"extreme {shape} {strategy}", launches, TARGETS[:1])


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
                kernel=launch.kernel,
                variant=f"{dtype} {channels} {side}²",
                unit=Cuda(cuda_impl.SOURCE, plan.defines),
                registers=registers,
                required=required,
            )
