"""What the kernels of group_norm_silu may cost.

They are bound by memory: each must move 16 bytes a load and a store, and keep enough of them in flight. The CUDA
kernels do so with many threads, of which 80 registers let a multiprocessor hold 768. The Triton kernels do so with
whole tiles in registers: 64 bytes a thread in float16, where 128 registers let it hold 512 threads, and 128 bytes a
thread in float32, where one block of 256 threads is as much in flight.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from fastsd_kernels.group_norm_silu import cuda_impl, op
from fastsd_kernels.triton_runtime import Launch
from tests.budgets.cubin import LOAD_16_BYTES, STORE_16_BYTES
from tests.budgets.gates import Gate
from tests.budgets.targets import TARGETS
from tests.budgets.triton_aot import compiling, gate, launches_of
from tests.budgets.units import Cuda

TRITON_REGISTERS = {"float16": 128, "bfloat16": 128, "float32": 168}
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
# batch, channels, positions; then groups
EXTREMES = (
    ((1, 1, 1), 1),
    ((1, 640, 9), 1),
    ((1, 128, 1 << 20), 32),
    ((1, 3, 1 << 30), 1),
    ((3 << 30, 1, 1), 1),
)


def gates() -> Iterator[Gate]:
    for dtype, layout in VARIANTS:
        yield from _cuda_gates(dtype, layout)
        for launch, required in _triton_launches(dtype, layout, (BATCH, X_CHANNELS, SIDE, SIDE), SKIP_CHANNELS):
            limits = {"registers": TRITON_REGISTERS[dtype], "required": required}
            yield gate("group_norm_silu", launch, f"{dtype} {layout}", **limits)
    for dtype, layout, skip_channels in itertools.product(DTYPES, LAYOUTS, (0, 320)):
        for launch, required in _triton_launches(dtype, layout, (1, 320, 64, 64), skip_channels):
            yield gate("group_norm_silu", launch, f"{dtype} {layout} 320+{skip_channels} 64²", required=required)
    for layout, ((batch, channels, space), groups) in itertools.product(LAYOUTS, EXTREMES):
        x = torch.empty(batch, space, channels, device="meta", dtype=torch.float16).transpose(1, 2)
        x = x if layout == "channels last" else x.contiguous()
        launches = launches_of(op, x=x, num_groups=groups)
        yield from compiling("group_norm_silu", f"extreme {tuple(x.shape)} {layout}", launches, TARGETS[:1])


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
        yield Gate(
            op="group_norm_silu",
            unit=Cuda(cuda_impl.SOURCE, plan.defines),
            kernel=launch.kernel,
            variant=f"{dtype} {layout}",
            registers=80,
            required=required,
        )


def _triton_launches(
    dtype: str, layout: str, shape: tuple[int, ...], skip_channels: int
) -> Iterator[tuple[Launch, tuple[str, ...]]]:
    """Each launch with the instructions that it must have."""
    like: dict[str, Any] = {"device": "meta", "dtype": DTYPES[dtype]}
    batch, channels, *space = shape
    skip = torch.empty(batch, skip_channels, *space, **like, memory_format=LAYOUTS[layout])
    channels += skip_channels
    launches = launches_of(
        op,
        x=torch.empty(shape, **like, memory_format=LAYOUTS[layout]),
        num_groups=GROUPS,
        weight=torch.empty(channels, **like),
        bias=torch.empty(channels, **like),
        activation="silu",
        channel_bias=torch.empty(batch, channels, **like),
        skip=skip if skip_channels else None,
    )
    yield from zip(launches, ((LOAD_16_BYTES,), (LOAD_16_BYTES, STORE_16_BYTES)), strict=True)
