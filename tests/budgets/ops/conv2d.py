"""What the kernels of conv2d may cost.

The Triton convolution keeps its accumulator in registers: 32 a thread for tiles of 128 positions by 64 channels, where
128 registers let a multiprocessor hold two blocks, so that one of them activates while the other multiplies; 64 a
thread for tiles of 128 by 128, where it holds one. Four input channels are loaded element by element, which costs
registers. The variants are convolutions of Stable Diffusion's U-Nets and decoder, and each tile that
``triton_impl.tile`` knows is among them.

The CUDA convolution has as many sums as that in no more than 128 registers: two blocks reside also of the largest
tiles. Its other kernels wait for memory and want many threads.
"""

from collections.abc import Iterator
from typing import Any

import torch

from fastsd_kernels.conv2d import cuda_impl, measured, op
from fastsd_kernels.triton_runtime import Launch
from tests.budgets.cubin import COPY_16_BYTES, LOAD_16_BYTES, SPILL, STORE_16_BYTES, TENSOR_CORES
from tests.budgets.gates import Gate
from tests.budgets.targets import TARGETS
from tests.budgets.triton_aot import compiling, gate, launches_of
from tests.budgets.units import Cuda

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# dtype, layout, channels of x and skip, output channels, side of the result, what surrounds the product, the tile that
# a measurement has chosen; then registers
TRITON = (
    ("float16", "channels_last", 320, 0, 320, 64, "norm", None, 128),
    ("bfloat16", "channels_last", 640, 320, 320, 64, "norm", None, 128),
    ("float16", "contiguous", 320, 0, 320, 64, "norm", None, 128),
    ("float16", "channels_last", 1280, 640, 640, 32, "norm", None, 208),
    ("float16", "channels_last", 1280, 0, 1280, 32, "upsampled", None, 128),
    ("float16", "channels_last", 1280, 0, 1280, 16, "pointwise", None, 128),
    ("float16", "channels_last", 1280, 1280, 1280, 8, "norm", None, 80),
    ("float16", "channels_last", 4, 0, 320, 64, "bare", None, 208),
    ("float16", "channels_last", 320, 0, 4, 64, "norm", None, 128),
    ("float32", "channels_last", 320, 320, 320, 64, "norm", None, 168),
    ("float32", "channels_last", 128, 0, 3, 512, "norm", None, 128),
    ("float16", "channels_last", 320, 0, 320, 64, "norm", "128x128", 208),
    ("float16", "channels_last", 320, 0, 320, 64, "norm", "64x128", 128),
    ("float16", "channels_last", 320, 0, 320, 64, "norm", "64x64", 80),
    ("float16", "channels_last", 320, 0, 320, 64, "norm", "64x32", 104),
    ("float16", "channels_last", 320, 0, 320, 64, "norm", "64x16", 96),
)
# The other kernels hardly depend on the variant: those of these two stand for all
COEFFICIENTS, SUM = TRITON[0], TRITON[6]
EXTREMES = ((1, 1, 1, 1), (2, 128, 1 << 12, 1 << 13), (3 << 30, 1, 1, 1))

# dtype, channels of x and skip, output channels, side of the result, side of the window, stride
CUDA = (
    ("float16", 640, 0, 640, 32, 3, 1),
    ("float16", 320, 0, 320, 64, 3, 1),
    ("bfloat16", 1280, 1280, 1280, 8, 3, 1),
    ("float16", 320, 0, 320, 32, 3, 2),
    ("bfloat16", 1280, 0, 1280, 16, 1, 1),
    ("float16", 4, 0, 320, 64, 3, 1),
    ("bfloat16", 320, 0, 4, 64, 3, 1),
)


def gates() -> Iterator[Gate]:
    yield from _cuda_gates()
    yield from _triton_gates()


def triton_launches(
    dtype: str,
    layout: str,
    x_channels: int,
    skip_channels: int,
    out_channels: int,
    side: int,
    around: str,
    tile: str | None,
) -> list[Launch]:
    """The launches of one variant, its tensors on ``meta``."""
    if tile is not None:
        with measured.forced(f"triton {tile}"):
            return triton_launches(dtype, layout, x_channels, skip_channels, out_channels, side, around, None)
    like: dict[str, Any] = {"device": "meta", "dtype": DTYPES[dtype]}
    kernel = 1 if around == "pointwise" else 3
    source = side // 2 if around == "upsampled" else side
    normed, channels = around == "norm", x_channels + skip_channels

    def feature_map(channels: int, side: int) -> torch.Tensor:
        return torch.empty(2, channels, side, side, **like, memory_format=FORMATS[layout])

    return launches_of(
        op,
        x=feature_map(x_channels, source),
        weight=torch.empty(out_channels, channels, kernel, kernel, **like, memory_format=FORMATS[layout]),
        bias=torch.empty(out_channels, **like),
        padding=kernel // 2,
        skip=feature_map(skip_channels, source) if skip_channels else None,
        num_groups=32 if normed else 0,
        norm_weight=torch.empty(channels, **like) if normed else None,
        norm_bias=torch.empty(channels, **like) if normed else None,
        activation="silu" if normed else "none",
        upsample_size=(side, side) if around == "upsampled" else None,
        channel_bias=torch.empty(2, out_channels, **like) if normed else None,
        residual=feature_map(out_channels, side) if normed else None,
    )


def _triton_gates() -> Iterator[Gate]:
    for variant in TRITON:
        *convolution, registers = variant
        dtype, layout, x_channels, skip_channels, out_channels, side, around, tile = convolution
        channels = f"{x_channels}+{skip_channels}" if skip_channels else x_channels
        launches = {launch.kernel.__name__: launch for launch in triton_launches(*convolution)}
        # float32 stays float32: tensor cores would round it to 10 bits
        forbidden = (SPILL, TENSOR_CORES) if dtype == "float32" else (SPILL,)
        required: tuple[str, ...] = () if dtype == "float32" else (TENSOR_CORES,)
        if x_channels != 4:
            # maps and weights go to shared memory while the product runs; four channels are but 8 bytes
            required = (*required, COPY_16_BYTES)
        limits = {"convolve": (registers, required if out_channels <= 16 else (*required, STORE_16_BYTES))}
        if variant is COEFFICIENTS:
            limits["norm_coefficients"] = 128, ()
        if variant is SUM:
            limits["sum_splits"] = 64, (LOAD_16_BYTES, STORE_16_BYTES)
        for kernel, (limit, required) in limits.items():
            text = f"{dtype} {layout} {channels} to {out_channels} {side}² {around}{f' {tile}' if tile else ''}"
            yield gate("conv2d", launches[kernel], text, registers=limit, required=required, forbidden=forbidden)
    for shape in EXTREMES:
        x = torch.empty(shape, device="meta", dtype=torch.float16)
        launches = launches_of(op, x=x, weight=x.new_empty(1, shape[1], 3, 3), padding=1, num_groups=1)
        yield from compiling("conv2d", f"extreme {shape}", launches, TARGETS[:1])


def _cuda_gates() -> Iterator[Gate]:
    for variant in CUDA:
        dtype, x_channels, skip_channels, out_channels, side, kernel, stride = variant
        # a convolution of one pixel knows no rows
        out_height, out_width = (1, side * side) if (kernel, stride) == (1, 1) else (side, side)
        plan = cuda_impl.plan(
            batch=2,
            x_channels=x_channels,
            skip_channels=skip_channels,
            num_groups=32,
            kernel=kernel,
            stride=stride,
            out_channels=out_channels,
            out_height=out_height,
            out_width=out_width,
            dtype=DTYPES[dtype],
            parameter_dtype=DTYPES[dtype],
            alignment=16,
            out_alignment=16,
            multiprocessors=132,
        )
        channels = f"{x_channels}+{skip_channels}" if skip_channels else x_channels
        required: tuple[str, ...] = TENSOR_CORES, LOAD_16_BYTES, COPY_16_BYTES
        if out_channels % 8 == 0:
            required = (*required, STORE_16_BYTES)
        limits: dict[str, tuple[int, tuple[str, ...]]] = {"conv2d_implicit_gemm": (128, required)}
        if variant is CUDA[0]:
            # the other kernels hardly depend on the variant
            limits["conv2d_coefficients"] = 48, ()
            limits["conv2d_reduce"] = 48, (LOAD_16_BYTES, STORE_16_BYTES)
        for name, (registers, required) in limits.items():
            yield Gate(
                op="conv2d",
                kernel=name,
                variant=f"{dtype} {channels} to {out_channels} {side}² {kernel}×{kernel} stride {stride}",
                unit=Cuda(cuda_impl.SOURCE, plan.defines),
                registers=registers,
                required=required,
            )
