"""What the kernels of gri_attention may cost.

The CUDA kernel holds a warp's queries, the scores of a tile of keys and the result in registers. 168 registers let a
multiprocessor have three blocks of four warps, so that one takes its softmax while others multiply; shared memory has
room for three of them up to heads of width 64. Keys and values arrive by asynchronous copies. The kernel that pools
waits for memory and wants many threads.

The Triton kernel's tiles of keys are small enough for Ampere, whose tensor cores multiply from registers: four blocks
of four warps there for heads of 40 and 80, three for 64, two for 160. Later cards, which multiply from shared memory,
need fewer registers.

In float32, and in its gradient, ptxas itself spills a register or two to have one block more: 16 bytes of stack.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastsd_kernels.gri_attention import cuda_impl, op, triton_backward, triton_impl
from tests.budgets.cubin import COPY_16_BYTES, LOAD_16_BYTES, STORE_16_BYTES, TENSOR_CORES
from tests.budgets.gates import Gate
from tests.budgets.targets import TARGETS
from tests.budgets.triton_aot import compiling, gate, launches_of
from tests.budgets.units import Cuda

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

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
# dtype, heads, width of a head, side of the map, window, pool, interaction: as many registers as there are
TRITON_UNLIMITED = (
    *((dtype, 8, width, 64, 16, 4, "gated") for dtype in ("float16", "float32") for width in (40, 64, 80, 160)),
    # the largest tiles in the smallest shared memory
    *((dtype, 2, width, 64, 16, 4, "joint") for dtype, width in (("float16", 160), ("float16", 512), ("float32", 512))),
)
# dtype, width of a head and interaction, each for some of the targets; then the bytes of stack that it may have
GRADIENTS = (
    ("float16", 40, "joint", TARGETS[2:], 0),
    ("float16", 64, "gated", TARGETS, 0),
    ("float16", 80, "joint", TARGETS, 0),
    ("float16", 160, "gated", TARGETS[1:2], 0),
    # the widest that there are, in the smallest of shared memories
    ("float16", 512, "gated", TARGETS[:1], 0),
    ("float32", 40, "gated", TARGETS[2:], 16),
    ("float32", 64, "joint", TARGETS[1:2], 16),
    ("float32", 80, "gated", TARGETS[:1], 16),
    # without tensor cores a warp of so wide rows has more sums and factors than registers
    ("float32", 160, "joint", TARGETS[2:], 400),
    ("float32", 256, "gated", TARGETS[:1], 400),
)
# dtype, batch, height and width of the map, width of a head, window, pool; then the kernels
EXTREMES = {
    "one token": ("float16", 1, (1, 1), 1, 1, 1, ("attend",)),
    "large map": ("float32", 1, (1 << 12, 1 << 13), 1, 33, 7, ("pool_cells", "attend")),
    "large batch": ("float16", 1 << 27, (16, 16), 40, 3, 5, ("pool_cells", "attend")),
}


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
                kernel=name,
                variant=f"{dtype} {heads} heads of {width} {side}² window {window} pool {pool}",
                unit=Cuda(cuda_impl.SOURCE, plan.defines),
                registers=registers,
                required=required,
            )


def triton_launches(
    dtype: str, heads: int, width: int, side: int, window: int, pool: int, interaction: str
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
    dtype: str, heads: int, width: int, side: int, window: int, pool: int, interaction: str
) -> tuple[Any, ...]:
    like: dict[str, Any] = {"device": "meta", "dtype": DTYPES[dtype]}
    q, k, v = (torch.empty(2, side * side, heads, width, **like).transpose(1, 2) for _ in range(3))
    gate = torch.empty(heads, **like) if interaction == "gated" else None
    return q, k, v, (side, side), (window, window), (pool, pool), interaction, False, gate, None


def _triton_gates() -> Iterator[Gate]:
    for *variant, limit in TRITON:
        for launch in triton_launches(*variant):
            registers, required = limit, (TENSOR_CORES, COPY_16_BYTES, STORE_16_BYTES)
            if launch.kernel.__name__ == "pool_cells":
                registers, required = 64, (LOAD_16_BYTES,)
            yield _triton_gate(variant, launch, registers=registers, required=required)
    limited = [variant[:-1] for variant in TRITON]
    for variant in (variant for variant in TRITON_UNLIMITED if variant not in limited):
        *_, attend = triton_launches(*variant)
        yield _triton_gate(variant, attend, **_by_dtype(variant[0], 16))
    for dtype, width, interaction, targets, stack in GRADIENTS:
        variant = (dtype, 8, width, 64, 16, 4, interaction)
        for step, launch in enumerate(gradient_launches(*variant), start=1):
            limited = _triton_gate(variant, launch, targets=targets, **_by_dtype(dtype, stack))
            yield replace(limited, variant=f"{limited.variant} step {step}")
    for name, (dtype, batch, grid, width, window, pool, kernels) in EXTREMES.items():
        q = torch.empty(batch, 2, grid[0] * grid[1], width, device="meta", dtype=DTYPES[dtype])
        given = {"grid": grid, "window": window, "pool": pool, "interaction": "gated", "gate": q.new_empty(2)}
        launches = launches_of(op, q=q, k=q, v=q, **given)
        assert [launch.kernel.__name__ for launch in launches] == list(kernels)
        yield from compiling("gri_attention", name, launches, TARGETS[:1])


def _by_dtype(dtype: str, stack_bytes: int) -> dict[str, Any]:
    # float32 stays float32: tensor cores would round it to 10 bits
    if dtype == "float32":
        return {"stack_bytes": stack_bytes, "forbidden": (TENSOR_CORES,)}
    return {"required": (TENSOR_CORES,)}


def _triton_gate(variant: Sequence[Any], launch: triton_impl.Launch, **limits: Any) -> Gate:
    dtype, heads, width, side, window, pool, interaction = variant
    text = f"{dtype} {heads} heads of {width} {side}² window {window} pool {pool} {interaction}"
    return gate("gri_attention", launch, text, **limits)
