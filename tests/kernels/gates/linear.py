"""What the kernels of linear may cost.

The CUDA product holds 64 sums a thread of its largest tiles in no more than 128 registers: two blocks of eight warps
reside, of which one normalises while the other multiplies. With 32 sums it needs 96.

The Triton product keeps its sums in registers: 32 a thread for tiles of 128 rows by 64 features, where it may have 128
registers, so that two blocks of eight warps reside and one of them normalises while the other multiplies; 64 a thread
for those of geglu, values and gates, and for tiles of 128 by 128, which stay within that too but where everything
surrounds the product. Each tile that ``triton_impl`` knows is among the variants: projections of Stable Diffusion 1.5
for one image or two, of its text, and wider ones of other models.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fastsd_kernels.linear import cuda_impl, triton_impl
from tests.proving import triton_aot
from tests.proving.gates import COPY_16_BYTES, LOAD_16_BYTES, SPILL, STORE_16_BYTES, TENSOR_CORES, Gate, cuda_cubin

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# dtype, rows, channels, features, whether there are gates; then registers. One cubin serves with a norm, gelu or
# residual and without.
CUDA = (
    ("float16", 8192, 320, 320, False, 96),
    ("bfloat16", 8192, 320, 1280, True, 128),
    ("float16", 8192, 1280, 320, False, 96),
    ("bfloat16", 2048, 640, 640, False, 96),
    ("float16", 2048, 640, 2560, True, 128),
    ("float16", 2048, 2560, 640, False, 96),
    ("float16", 512, 1280, 1280, False, 96),
    ("bfloat16", 512, 1280, 5120, True, 128),
    ("bfloat16", 512, 5120, 1280, False, 96),
    ("bfloat16", 128, 1280, 1280, False, 96),
    ("float16", 128, 1280, 5120, True, 104),
    ("float16", 154, 768, 320, False, 80),
    ("bfloat16", 154, 768, 1280, False, 96),
    ("float16", 8192, 640, 640, False, 128),
)

# dtype, rows, channels, features, activation, what surrounds the product; then registers
TRITON = (
    ("float16", 8192, 320, 320, "none", "norm", 112),
    ("bfloat16", 8192, 320, 1280, "geglu", "norm", 128),
    ("float16", 8192, 1280, 320, "none", "residual", 104),
    ("float16", 2048, 640, 640, "none", "norm", 112),
    ("float16", 2048, 640, 2560, "geglu", "norm", 128),
    ("bfloat16", 2048, 2560, 640, "none", "residual", 88),
    ("float16", 512, 1280, 1280, "none", "norm", 72),
    ("bfloat16", 512, 1280, 5120, "geglu", "norm", 128),
    ("float16", 512, 5120, 1280, "none", "residual", 56),
    ("float16", 128, 1280, 1280, "none", "norm", 80),
    ("float16", 128, 1280, 5120, "geglu", "norm", 128),
    ("float16", 64, 1280, 5120, "geglu", "norm", 96),
    ("float16", 154, 768, 320, "none", "bare", 56),
    ("bfloat16", 154, 1024, 4096, "gelu", "norm", 72),
    ("float16", 8192, 640, 640, "none", "norm", 128),
    ("float16", 8192, 640, 640, "gelu", "everything", 216),
    ("float32", 8192, 320, 320, "none", "norm", 168),
    ("float32", 8192, 320, 1280, "geglu", "norm", 168),
    ("float32", 8192, 1280, 320, "none", "residual", 168),
    ("float32", 154, 768, 320, "none", "bare", 112),
)


def gates() -> Iterator[Gate]:
    yield from _cuda_gates()
    yield from _triton_gates()


def _cuda_gates() -> Iterator[Gate]:
    for variant in CUDA:
        dtype, rows, channels, features, gated, registers = variant
        plan = cuda_impl.plan(
            rows=rows,
            width=channels,
            features=features,
            gated=gated,
            dtype=DTYPES[dtype],
            parameter_dtype=DTYPES[dtype],
            alignment=16,
            out_alignment=16,
            multiprocessors=132,
        )
        needed: tuple[str, ...] = TENSOR_CORES, LOAD_16_BYTES, COPY_16_BYTES, STORE_16_BYTES
        limits = {plan.project.kernel: (registers, needed)}
        if variant is CUDA[0]:
            # the moments hardly depend on the variant
            limits[plan.moments.kernel] = 40, (LOAD_16_BYTES,)
        for kernel, (limit, required) in limits.items():
            yield Gate(
                op="linear",
                backend="cuda",
                kernel=kernel,
                variant=f"{dtype} {rows} by {channels} to {features}{' gated' if gated else ''}",
                compile=partial(cuda_cubin, cuda_impl.SOURCE, defines=plan.defines),
                registers=limit,
                required=required,
            )


def triton_launches(
    dtype: str | torch.dtype, rows: int, channels: int, features: int, activation: str, around: str
) -> tuple[triton_impl.Launch, ...]:
    """The launches of one variant, its tensors on ``meta``."""
    like: dict[str, Any] = {"device": "meta", "dtype": DTYPES.get(dtype, dtype)}  # type: ignore[call-overload]
    normed, summed = around in ("norm", "everything"), around in ("residual", "everything")
    out = features * 2 if activation == "geglu" else features
    return triton_impl.launches(
        x=torch.empty(rows, channels, **like),
        weight=torch.empty(out, channels, **like),
        bias=torch.empty(out, **like),
        norm_weight=torch.empty(channels, **like) if normed else None,
        norm_bias=torch.empty(channels, **like) if normed else None,
        norm_eps=1e-5 if normed else None,
        activation=activation,
        residual=torch.empty(rows, features, **like) if summed else None,
    )[1]


def _triton_gates() -> Iterator[Gate]:
    for variant in TRITON:
        *linear, registers = variant
        dtype, rows, channels, features, activation, around = linear
        # float32 stays float32: tensor cores would round it to 10 bits
        single = dtype == "float32"
        required: tuple[str, ...] = () if single else (TENSOR_CORES,)
        limits = {"project": (registers, (*required, COPY_16_BYTES, STORE_16_BYTES))}
        if variant is TRITON[0]:
            # the moments hardly depend on the variant
            limits["row_moments"] = 56, (LOAD_16_BYTES,)
        launches = {launch.kernel.__name__: launch for launch in triton_launches(*linear)}
        for kernel, (limit, needed) in limits.items():
            yield Gate(
                op="linear",
                backend="triton",
                kernel=kernel,
                variant=f"{dtype} {rows} by {channels} to {features} {activation} {around}",
                compile=partial(triton_aot.compile_launch, launches[kernel]),
                registers=limit,
                required=needed,
                forbidden=(SPILL, TENSOR_CORES) if single else (SPILL,),
            )
