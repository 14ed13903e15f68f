"""What the kernels of resnet_block may cost beyond those of conv2d.

In Triton it is the epilogue that takes moments, which must not cost the convolution a resident block: two in 128
registers for tiles of 128 positions by 64 channels, one with the larger tile.

In CUDA the first convolution, too, keeps the registers of a plain one, and with them two resident blocks.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fastsd_kernels.conv2d import cuda_impl
from fastsd_kernels.resnet_block import cases, op
from fastsd_kernels.testing import named
from fastsd_kernels.triton_runtime import Launch
from tests.budgets.cubin import COPY_16_BYTES, LOAD_16_BYTES, SPILL, STORE_16_BYTES, TENSOR_CORES
from tests.budgets.gates import Gate
from tests.budgets.ops.conv2d import DTYPES, FORMATS
from tests.budgets.targets import TARGETS
from tests.budgets.triton_aot import Triton, compiling, launches_of
from tests.budgets.units import Cuda

# dtype, layout, channels of x and skip, output channels, side; then the kernel that takes moments, and its registers
TRITON = (
    ("float16", "channels_last", 320, 0, 320, 64, "convolve", 128),
    ("float16", "contiguous", 640, 320, 320, 64, "convolve", 128),
    ("float16", "channels_last", 640, 0, 640, 32, "convolve", 224),
    ("float16", "channels_last", 1280, 0, 1280, 8, "sum_splits", 64),
    ("float32", "channels_last", 128, 0, 128, 512, "convolve", 168),
)
# The merge hardly depends on the variant
MERGE = TRITON[0]
EXTREMES = ((1, 1, 1, 1), (2, 128, 1 << 12, 1 << 13), (1, 5000, 3, 3))

# dtype, channels of x and skip, output channels, side
CUDA = (
    ("float16", 320, 0, 320, 64),
    ("bfloat16", 640, 320, 320, 64),
    ("float16", 640, 0, 640, 32),
    ("bfloat16", 1280, 640, 640, 32),
)


def gates() -> Iterator[Gate]:
    yield from _cuda_gates()
    yield from _triton_gates()


def triton_launches(
    dtype: str, layout: str, x_channels: int, skip_channels: int, out_channels: int, side: int
) -> list[Launch]:
    """The launches of one variant, its tensors on ``meta``."""
    like: dict[str, Any] = {"device": "meta", "dtype": DTYPES[dtype]}
    channels = x_channels + skip_channels

    def feature_map(channels: int) -> torch.Tensor:
        return torch.empty(2, channels, side, side, **like, memory_format=FORMATS[layout])

    def weight(channels: int, kernel: int) -> torch.Tensor:
        return torch.empty(out_channels, channels, kernel, kernel, **like, memory_format=FORMATS[layout])

    into, out = torch.empty(channels, **like), torch.empty(out_channels, **like)
    return launches_of(
        op,
        x=feature_map(x_channels),
        conv1_weight=weight(channels, 3),
        conv2_weight=weight(out_channels, 3),
        conv1_bias=out,
        conv2_bias=out,
        skip=feature_map(skip_channels) if skip_channels else None,
        num_groups=32,
        norm1_weight=into,
        norm1_bias=into,
        norm2_weight=out,
        norm2_bias=out,
        channel_bias=torch.empty(2, out_channels, **like),
        shortcut_weight=None if channels == out_channels else weight(channels, 1),
        shortcut_bias=None if channels == out_channels else out,
    )


def moment_launches(launches: Iterable[Launch]) -> tuple[Launch, Launch]:
    """The launch that leaves moments, and the one that merges them."""
    writer, merge = (
        step
        for step in launches
        if dict(zip(step.kernel.arg_names, step.args, strict=True)).get("moments_ptr") is not None
    )
    return writer, merge


def _triton_gates() -> Iterator[Gate]:
    for variant in TRITON:
        *block, kernel, registers = variant
        dtype, layout, x_channels, skip_channels, out_channels, side = block
        channels = f"{x_channels}+{skip_channels}" if skip_channels else x_channels
        writer, merge = moment_launches(triton_launches(*block))
        forbidden: tuple[str, ...] = (SPILL,)
        if kernel == "sum_splits":
            required: tuple[str, ...] = LOAD_16_BYTES, STORE_16_BYTES
        elif dtype == "float32":
            # it stays float32: tensor cores would round it to 10 bits
            required, forbidden = (COPY_16_BYTES, STORE_16_BYTES), (SPILL, TENSOR_CORES)
        else:
            required = COPY_16_BYTES, STORE_16_BYTES, TENSOR_CORES
        costs = [(writer, kernel, registers, required, forbidden)]
        if variant is MERGE:
            costs.append((merge, "moment_coefficients", 48, (), (SPILL,)))
        for launch, name, limit, required, forbidden in costs:
            yield Gate(
                op="resnet_block",
                kernel=name,
                variant=f"{dtype} {layout} {channels} to {out_channels} {side}² with moments",
                unit=Triton(launch),
                registers=limit,
                required=required,
                forbidden=forbidden,
            )
    sample = named(cases.samples("cpu", torch.bfloat16), "identity_contiguous")
    yield from compiling("resnet_block", sample.name, launches_of(op, **sample.kwargs))
    for shape in EXTREMES:
        x = torch.empty(shape, device="meta", dtype=torch.float16)
        weight = x.new_empty(shape[1], shape[1], 3, 3)
        launches = moment_launches(launches_of(op, x=x, conv1_weight=weight, conv2_weight=weight, num_groups=1))
        yield from compiling("resnet_block", f"extreme {shape}", launches, TARGETS[:1])


def _cuda_gates() -> Iterator[Gate]:
    for dtype, x_channels, skip_channels, out_channels, side in CUDA:
        plan = cuda_impl.plan(
            batch=8,  # with fewer samples the input channels of 32² would be split
            x_channels=x_channels,
            skip_channels=skip_channels,
            num_groups=32,
            kernel=3,
            stride=1,
            out_channels=out_channels,
            out_height=side,
            out_width=side,
            dtype=DTYPES[dtype],
            parameter_dtype=DTYPES[dtype],
            alignment=16,
            out_alignment=16,
            multiprocessors=132,
            moments=True,
        )
        assert plan.patch is not None
        channels = f"{x_channels}+{skip_channels}" if skip_channels else x_channels
        yield Gate(
            op="resnet_block",
            kernel="conv2d_implicit_gemm",
            variant=f"{dtype} {channels} to {out_channels} {side}² with moments",
            unit=Cuda(cuda_impl.SOURCE, plan.defines),
            registers=128,
            required=(TENSOR_CORES, LOAD_16_BYTES, COPY_16_BYTES, STORE_16_BYTES),
        )
