"""What the kernels of attention may cost.

The CUDA kernel holds what gri_attention's does, and may have as many registers: 168, for three blocks of four warps on
a multiprocessor; 128, for four of them, with heads of 40 and many keys. The 77 keys of a text are one larger tile.

The Triton kernel has the tiles of gri_attention's: of few enough keys for Ampere, whose tensor cores multiply from
registers. Without cells and gates it needs fewer of them: five blocks of four warps there for heads of 40, four for
64 and 80, two for 160. Later cards, which multiply from shared memory, need fewer.

In float32 ptxas itself gives up a few values of heads of 64, 80 or 160, on one card or another, to have one block
more. Those have no row here; tests/kernels/test_attention_triton.py holds them to 16 bytes of stack.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fastsd_kernels.attention import cuda_impl, triton_impl
from tests.proving import triton_aot
from tests.proving.gates import COPY_16_BYTES, LOAD_16_BYTES, SPILL, STORE_16_BYTES, TENSOR_CORES, Gate, cuda_cubin

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# dtype, heads, queries, keys, width of a head; then registers. One cubin serves with a bias and without.
CUDA = (
    ("float16", 8, 4096, 4096, 40, 128),
    ("bfloat16", 8, 4096, 4096, 40, 128),
    ("float16", 8, 4096, 77, 40, 168),
    ("bfloat16", 8, 4096, 77, 40, 168),
    ("float16", 10, 4096, 4096, 64, 168),
    ("bfloat16", 20, 1024, 77, 64, 168),
    ("bfloat16", 8, 1024, 1024, 80, 168),
    ("float16", 8, 1024, 77, 80, 168),
    ("float16", 8, 256, 256, 160, 168),
    ("bfloat16", 8, 256, 77, 160, 168),
)

# dtype, heads, queries, keys, width of a head, whether there is a bias; then registers
TRITON = (
    ("float16", 8, 4096, 4096, 40, False, 96),
    ("bfloat16", 8, 4096, 77, 40, False, 96),
    ("float16", 8, 4096, 77, 40, True, 96),
    ("float16", 10, 4096, 4096, 64, False, 128),
    ("bfloat16", 20, 1024, 77, 64, True, 128),
    ("bfloat16", 8, 1024, 1024, 80, False, 128),
    ("float16", 8, 256, 256, 160, False, 192),
    ("float16", 1, 4096, 4096, 512, False, 168),
    ("float32", 8, 4096, 4096, 40, False, 64),
    ("float32", 8, 4096, 77, 40, True, 64),
    ("float32", 10, 4096, 4096, 64, False, 64),
    ("float32", 8, 1024, 77, 80, True, 88),
    ("float32", 1, 4096, 4096, 512, False, 248),
)


def gates() -> Iterator[Gate]:
    yield from _cuda_gates()
    yield from _triton_gates()


def _cuda_gates() -> Iterator[Gate]:
    for dtype, heads, queries, keys, width, registers in CUDA:
        plan = cuda_impl.plan(
            batch=2,
            heads=heads,
            width=width,
            queries=queries,
            keys=keys,
            dtype=DTYPES[dtype],
            alignment=16,
            multiprocessors=132,
        )
        yield Gate(
            op="attention",
            backend="cuda",
            kernel=plan.attend.kernel,
            variant=f"{dtype} {heads} heads of {width} {queries} by {keys}",
            compile=partial(cuda_cubin, cuda_impl.SOURCE, defines=plan.defines),
            registers=registers,
            required=(TENSOR_CORES, COPY_16_BYTES, STORE_16_BYTES),
        )


def triton_launch(
    dtype: str | torch.dtype, heads: int, queries: int, keys: int, width: int, biased: bool
) -> triton_impl.Launch:
    """The launch of one variant, its tensors on ``meta``, as projections give them."""
    like: dict[str, Any] = {"device": "meta", "dtype": DTYPES.get(dtype, dtype)}  # type: ignore[call-overload]
    q, k, v = (torch.empty(2, count, heads, width, **like).transpose(1, 2) for count in (queries, keys, keys))
    (launch,) = triton_impl.launches(q, k, v, torch.empty(2, keys, **like) if biased else None, None)[1]
    return launch


def _triton_gates() -> Iterator[Gate]:
    for *variant, registers in TRITON:
        dtype, heads, queries, keys, width, biased = variant
        launch = triton_launch(*variant)
        # float32 stays float32: tensor cores would round it to 10 bits
        single = dtype == "float32"
        yield Gate(
            op="attention",
            backend="triton",
            kernel=launch.kernel.__name__,
            variant=f"{dtype} {heads} heads of {width} {queries} by {keys}{' biased' if biased else ''}",
            compile=partial(triton_aot.compile_launch, launch),
            registers=registers,
            required=(LOAD_16_BYTES, STORE_16_BYTES) if single else (TENSOR_CORES, COPY_16_BYTES, STORE_16_BYTES),
            forbidden=(SPILL, TENSOR_CORES) if single else (SPILL,),
        )
