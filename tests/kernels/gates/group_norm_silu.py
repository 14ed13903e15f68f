"""What the kernels of group_norm_silu may cost.

They are bound by memory: each must move 16 bytes a load and a store, and keep enough of them in flight. The CUDA
kernels do so with many threads, of which 80 registers let a multiprocessor hold 768. The Triton kernels do so with
whole tiles in registers: 64 bytes a thread in float16, where 128 registers let it hold 512 threads, and 128 bytes a
thread in float32, where one block of 256 threads is as much in flight.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fastsd_kernels.group_norm_silu import cuda_impl, triton_impl
from tests.proving import triton_aot
from tests.proving.gates import LOAD_16_BYTES, STORE_16_BYTES, Gate, cuda_cubin

REGISTERS = {
    "cuda": {"float16": 80, "bfloat16": 80, "float32": 80},
    "triton": {"float16": 128, "bfloat16": 128, "float32": 168},
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
VARIANTS = (
    ("float16", "contiguous"),
    ("float16", "channels last"),
    ("bfloat16", "channels last"),
    ("float32", "contiguous"),
)


# The first norm of SDXL's last up block: groups of 30 channels, no multiple of a vector, one of them across the seam
BATCH, X_CHANNELS, SKIP_CHANNELS, GROUPS, SIDE = 2, 640, 320, 32, 128


def gates() -> Iterator[Gate]:
    for dtype, layout in VARIANTS:
        yield from _cuda_gates(dtype, layout)
        yield from _triton_gates(dtype, layout)


def _gate(backend: str, dtype: str, layout: str, **given: Any) -> Gate:
    return Gate(
        op="group_norm_silu",
        backend=backend,
        variant=f"{dtype} {layout}",
        registers=REGISTERS[backend][dtype],
        **given,
    )


def _cuda_gates(dtype: str, layout: str) -> Iterator[Gate]:
    plan = cuda_impl.plan(
        batch=BATCH,
        x_channels=X_CHANNELS,
        skip_channels=SKIP_CHANNELS,
        space=SIDE * SIDE,
        num_groups=GROUPS,
        channels_last=layout == "channels last",
        dtype=DTYPES[dtype],
        parameter_dtype=DTYPES[dtype],
        alignment=16,
        multiprocessors=132,
    )
    for launch, required in ((plan.stats, (LOAD_16_BYTES,)), (plan.apply, (LOAD_16_BYTES, STORE_16_BYTES))):
        compile = partial(cuda_cubin, cuda_impl.SOURCE, defines=plan.defines)
        yield _gate("cuda", dtype, layout, kernel=launch.kernel, compile=compile, required=required)


def _triton_gates(dtype: str, layout: str) -> Iterator[Gate]:
    like: dict[str, Any] = {"device": "meta", "dtype": DTYPES[dtype]}
    channels = X_CHANNELS + SKIP_CHANNELS
    _, launches = triton_impl.launches(
        x=torch.empty(BATCH, X_CHANNELS, SIDE, SIDE, **like, memory_format=LAYOUTS[layout]),
        num_groups=GROUPS,
        weight=torch.empty(channels, **like),
        bias=torch.empty(channels, **like),
        eps=1e-5,
        activation="silu",
        channel_bias=torch.empty(BATCH, channels, **like),
        skip=torch.empty(BATCH, SKIP_CHANNELS, SIDE, SIDE, **like, memory_format=LAYOUTS[layout]),
    )
    for launch, required in zip(launches, ((LOAD_16_BYTES,), (LOAD_16_BYTES, STORE_16_BYTES)), strict=True):
        compile = partial(triton_aot.compile_launch, launch)
        yield _gate("triton", dtype, layout, kernel=launch.kernel.__name__, compile=compile, required=required)
