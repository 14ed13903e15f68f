"""What the kernels of gri_attention may cost.

The CUDA kernel holds a warp's queries, the scores of a tile of keys and the result in registers. 168 registers let a
multiprocessor have three blocks of four warps, so that one takes its softmax while others multiply; shared memory has
room for three of them up to heads of width 64. Keys and values arrive by asynchronous copies. The kernel that pools
waits for memory and wants many threads.

The Triton kernel's tiles of keys are small enough for Ampere, whose tensor cores multiply from registers: four blocks
of four warps there for heads of 40 and 80, three for 64, two for 160. Later cards, which multiply from shared memory,
need fewer registers.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fastsd_kernels.gri_attention import cuda_impl, triton_backward, triton_impl
from tests.proving import triton_aot
from tests.proving.gates import COPY_16_BYTES, LOAD_16_BYTES, STORE_16_BYTES, TENSOR_CORES, Gate, cuda_cubin

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

# dtype, heads, width of a head, side of the map, window, pool
CUDA = (
    ("float16", 8, 40, 64, 16, 4),
    ("bfloat16", 8, 40, 64, 8, 8),
    ("float16", 5, 64, 64, 16, 4),
    ("bfloat16", 10, 64, 32, 8, 4),
    ("float16", 8, 80, 32, 8, 4),
    ("bfloat16", 8, 80, 32, 16, 4),
    ("float16", 8, 160, 16, 8, 2),
    ("bfloat16", 8, 160, 32, 8, 4),
)


# dtype, heads, width of a head, side of the map, window, pool, interaction; then registers
TRITON = (
    ("float16", 8, 40, 64, 16, 4, "joint", 128),
    ("bfloat16", 8, 40, 64, 8, 8, "joint", 128),
    ("float16", 8, 40, 64, 16, 4, "gated", 128),
    ("float16", 10, 64, 64, 16, 4, "joint", 144),
    ("bfloat16", 10, 64, 64, 8, 8, "gated", 144),
    ("float16", 8, 80, 32, 8, 4, "joint", 128),
    ("bfloat16", 8, 160, 16, 8, 2, "joint", 192),
)


def gates() -> Iterator[Gate]:
    yield from _cuda_gates()
    yield from _triton_gates()


def _cuda_gates() -> Iterator[Gate]:
    for dtype, heads, width, side, window, pool in CUDA:
        plan = cuda_impl.plan(
            batch=2,
            heads=heads,
            width=width,
            grid=(side, side),
            window=(window, window),
            pool=(pool, pool),
            gated=False,
            dtype=DTYPES[dtype],
            alignment=16,
            multiprocessors=132,
        )
        for name, registers, required in (
            ("gri_attention_attend", 168, (TENSOR_CORES, COPY_16_BYTES, STORE_16_BYTES)),
            ("gri_attention_pool", 64, (LOAD_16_BYTES, STORE_16_BYTES)),
        ):
            yield Gate(
                op="gri_attention",
                backend="cuda",
                kernel=name,
                variant=f"{dtype} {heads} heads of {width} {side}² window {window} pool {pool}",
                compile=partial(cuda_cubin, cuda_impl.SOURCE, defines=plan.defines),
                registers=registers,
                required=required,
            )


def triton_launches(
    dtype: str | torch.dtype, heads: int, width: int, side: int, window: int, pool: int, interaction: str
) -> list[triton_impl.Launch]:
    """The launches of one variant, its tensors on ``meta``, as projections give them."""
    inputs = _triton_inputs(dtype, heads, width, side, window, pool, interaction)
    return [step for step in triton_impl.launches(*inputs)[1] if isinstance(step, triton_impl.Launch)]


def gradient_launches(*variant: Any) -> list[triton_impl.Launch]:
    """The four steps of the gradient of a variant as of :func:`triton_launches`."""
    inputs = _triton_inputs(*variant)
    _, steps = triton_backward.steps(inputs[0], *inputs)
    return [step for step in steps if isinstance(step, triton_impl.Launch)][-4:]


def _triton_inputs(
    dtype: str | torch.dtype, heads: int, width: int, side: int, window: int, pool: int, interaction: str
) -> tuple[Any, ...]:
    like: dict[str, Any] = {"device": "meta", "dtype": DTYPES.get(dtype, dtype)}  # type: ignore[call-overload]
    q, k, v = (torch.empty(2, side * side, heads, width, **like).transpose(1, 2) for _ in range(3))
    gate = torch.empty(heads, **like) if interaction == "gated" else None
    return q, k, v, (side, side), (window, window), (pool, pool), interaction, False, gate, None


def _triton_gates() -> Iterator[Gate]:
    for *variant, limit in TRITON:
        dtype, heads, width, side, window, pool, interaction = variant
        for launch in triton_launches(*variant):
            kernel = launch.kernel.__name__
            registers, required = limit, (TENSOR_CORES, COPY_16_BYTES, STORE_16_BYTES)
            if kernel == "pool_cells":
                registers, required = 64, (LOAD_16_BYTES,)
            yield Gate(
                op="gri_attention",
                backend="triton",
                kernel=kernel,
                variant=f"{dtype} {heads} heads of {width} {side}² window {window} pool {pool} {interaction}",
                compile=partial(triton_aot.compile_launch, launch),
                registers=registers,
                required=required,
            )
