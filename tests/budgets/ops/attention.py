"""What the kernels of attention may cost.

The CUDA kernel holds what gri_attention's does, and may have as many registers: 168, for three blocks of four warps on
a multiprocessor; 128, for four of them, with heads of 40 and many keys. The 77 keys of a text are one larger tile.

The Triton kernel has the tiles of gri_attention's: of few enough keys for Ampere, whose tensor cores multiply from
registers. Without cells and gates it needs fewer of them: five blocks of four warps there for heads of 40, four for
64 and 80, two for 160. Later cards, which multiply from shared memory, need fewer.

In float32 ptxas itself gives up a few values of heads of 64, 80 or 160, on one card or another, to have one block
more. Those may have 16 bytes of stack.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastsd_kernels.attention import cuda_impl, op
from fastsd_kernels.triton_runtime import Launch
from tests.budgets.cubin import COPY_16_BYTES, LOAD_16_BYTES, SPILL, STORE_16_BYTES, TENSOR_CORES
from tests.budgets.gates import Gate
from tests.budgets.targets import TARGETS
from tests.budgets.triton_aot import compiling, gate, launches_of
from tests.budgets.units import Cuda

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

# As many registers as there are, in every width; and the largest tiles in the smallest shared memory
TRITON_UNLIMITED = (
    *(
        (dtype, 8, 4096, 77, width, biased)
        for dtype, biased, width in itertools.product(("float16", "float32"), (False, True), (40, 64, 80, 160))
    ),
    *((dtype, 1, 4096, 4096, width, True) for dtype, width in (("float16", 160), ("float16", 512), ("float32", 512))),
)
# batch, heads, queries, keys, width of a head, whether there is a bias
EXTREMES = {
    "one token": (1, 1, 1, 1, 1, True),
    "many tokens": (1, 2, 1 << 30, 1 << 30, 1, True),
    "large batch": (1 << 27, 2, 1, 1 << 20, 40, True),
    "wide": (1, 2, 77, 77, 512, False),
}


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
            kernel=plan.attend.kernel,
            variant=f"{dtype} {heads} heads of {width} {queries} by {keys}",
            unit=Cuda(cuda_impl.SOURCE, plan.defines),
            registers=registers,
            required=(TENSOR_CORES, COPY_16_BYTES, STORE_16_BYTES),
        )


def triton_launch(dtype: str, heads: int, queries: int, keys: int, width: int, biased: bool) -> Launch:
    """The launch of one variant, its tensors on ``meta``, as projections give them."""
    like: dict[str, Any] = {"device": "meta", "dtype": DTYPES[dtype]}
    q, k, v = (torch.empty(2, count, heads, width, **like).transpose(1, 2) for count in (queries, keys, keys))
    (launch,) = launches_of(op, q=q, k=k, v=v, bias=torch.empty(2, keys, **like) if biased else None)
    return launch


def _triton_gates() -> Iterator[Gate]:
    for *variant, registers in TRITON:
        # float32 stays float32: tensor cores would round it to 10 bits
        single = variant[0] == "float32"
        yield _triton_gate(
            variant,
            registers=registers,
            required=(LOAD_16_BYTES, STORE_16_BYTES) if single else (TENSOR_CORES, COPY_16_BYTES, STORE_16_BYTES),
            forbidden=(SPILL, TENSOR_CORES) if single else (SPILL,),
        )
    limited = [variant[:-1] for variant in TRITON]
    for variant in (variant for variant in TRITON_UNLIMITED if variant not in limited):
        if variant[0] == "float32":
            yield _triton_gate(variant, stack_bytes=16, forbidden=(TENSOR_CORES,))
        else:
            yield _triton_gate(variant, required=(TENSOR_CORES,))
    for name, (batch, heads, queries, keys, width, biased) in EXTREMES.items():
        q, k = (torch.empty(batch, heads, n, width, device="meta", dtype=torch.float16) for n in (queries, keys))
        launches = launches_of(op, q=q, k=k, v=k, bias=k.new_empty(1, keys) if biased else None)
        yield from compiling("attention", name, launches, TARGETS[:1])


def _triton_gate(variant: Sequence[Any], **limits: Any) -> Gate:
    dtype, heads, queries, keys, width, biased = variant
    text = f"{dtype} {heads} heads of {width} {queries} by {keys}{' biased' if biased else ''}"
    return gate("attention", triton_launch(*variant), text, **limits)
