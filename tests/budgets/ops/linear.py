"""What the kernels of linear may cost.

The CUDA product holds 64 sums a thread of its largest tiles in no more than 128 registers: two blocks of eight warps
reside, of which one normalises while the other multiplies. With 32 sums it needs 96.

The Triton product keeps its sums in registers: 32 a thread for tiles of 128 rows by 64 features, where it may have 128
registers, so that two blocks of eight warps reside and one of them normalises while the other multiplies; 64 a thread
for those of geglu, values and gates, and for tiles of 128 by 128, which stay within that too but where everything
surrounds the product. Each tile that ``triton_impl`` knows is among the variants: projections of Stable Diffusion 1.5
for one image or two, of its text, and wider ones of other models.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastsd_kernels.linear import cuda_impl, op
from fastsd_kernels.triton_runtime import Launch
from tests.budgets.cubin import COPY_16_BYTES, LOAD_16_BYTES, SPILL, STORE_16_BYTES, TENSOR_CORES
from tests.budgets.gates import Gate
from tests.budgets.targets import TARGETS
from tests.budgets.triton_aot import compiling, gate, launches_of
from tests.budgets.units import Cuda

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

# dtype, rows, channels, features, activation, what surrounds the product: as many registers as there are
TRITON_UNLIMITED = (
    *(
        (dtype, 8192, 640, 640, activation, around)
        for dtype, activation, around in itertools.product(
            DTYPES, ("none", "gelu", "quick_gelu", "geglu"), ("bare", "everything")
        )
    ),
    # the largest tiles in the smallest shared memory
    ("float16", 8192, 320, 1280, "geglu", "everything"),
    ("float32", 8192, 320, 320, "none", "everything"),
    ("float32", 8192, 320, 1280, "geglu", "everything"),
)
# shape and strides of x; then how many rows the weight has
EXTREMES = {
    "one number": ((1, 1), (1, 1), 2),
    "many rows": ((3 << 32, 1), (1, 1), 2),
    "rows far apart": ((3 << 30, 8), (1 << 33, 1), 2),
    "many channels": ((1, 1 << 30), (1 << 30, 1), 2),
    "many features": ((1, 1), (1, 1), 1 << 30),
}


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
                kernel=kernel,
                variant=f"{dtype} {rows} by {channels} to {features}{' gated' if gated else ''}",
                unit=Cuda(cuda_impl.SOURCE, plan.defines),
                registers=limit,
                required=required,
            )


def triton_launches(dtype: str, rows: int, channels: int, features: int, activation: str, around: str) -> list[Launch]:
    """The launches of one variant, its tensors on ``meta``."""
    like: dict[str, Any] = {"device": "meta", "dtype": DTYPES[dtype]}
    normed, summed = around in ("norm", "everything"), around in ("residual", "everything")
    out = features * 2 if activation == "geglu" else features
    return launches_of(
        op,
        x=torch.empty(rows, channels, **like),
        weight=torch.empty(out, channels, **like),
        bias=torch.empty(out, **like),
        norm_weight=torch.empty(channels, **like) if normed else None,
        norm_bias=torch.empty(channels, **like) if normed else None,
        norm_eps=1e-5 if normed else None,
        activation=activation,
        residual=torch.empty(rows, features, **like) if summed else None,
    )


def _triton_gates() -> Iterator[Gate]:
    limited = {variant[:-1]: variant[-1] for variant in TRITON}
    for variant in dict.fromkeys((*limited, *TRITON_UNLIMITED)):
        # float32 stays float32: tensor cores would round it to 10 bits
        required, forbidden = ((), (SPILL, TENSOR_CORES)) if variant[0] == "float32" else ((TENSOR_CORES,), (SPILL,))
        *before, project = triton_launches(*variant)
        registers = limited.get(variant)
        if registers is not None:
            required = (*required, COPY_16_BYTES, STORE_16_BYTES)
        yield _triton_gate(variant, project, registers=registers, required=required, forbidden=forbidden)
        if variant == TRITON[0][:-1]:
            # the moments hardly depend on the variant
            yield _triton_gate(variant, *before, registers=56, required=(LOAD_16_BYTES,))
    yield from _transposed()
    for name, (shape, strides, out) in EXTREMES.items():
        x = torch.empty_strided(shape, strides, device="meta", dtype=torch.float16)
        weight = x.new_empty(out, x.shape[-1])
        launches = launches_of(op, x=x, weight=weight, activation="geglu", norm_eps=1e-5)
        yield from compiling("linear", name, launches, TARGETS[:1])


def _transposed() -> Iterator[Gate]:
    """A transposed weight goes to shared memory in accesses as wide as any."""
    x = torch.empty(8192, 640, device="meta", dtype=torch.float16)
    weight = x.new_empty(640, 640)
    (usual,) = compiling("linear", "weight as usual", launches_of(op, x=x, weight=weight))
    (wide,) = compiling("linear", "weight transposed", launches_of(op, x=x, weight=weight.t()))
    yield replace(usual, required=(COPY_16_BYTES,))
    yield replace(wide, as_many=(COPY_16_BYTES, usual))


def _triton_gate(variant: Sequence[Any], launch: Launch, **limits: Any) -> Gate:
    dtype, rows, channels, features, activation, around = variant
    return gate("linear", launch, f"{dtype} {rows} by {channels} to {features} {activation} {around}", **limits)
