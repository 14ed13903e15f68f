"""The CUDA C++ backend; kernels in ``csrc/cuda/linear.cu``.

Rows of ``x``, of the weight and of the residual are read where they are; those whose elements are not side by side, or
that have no common distance, are copied.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsd_kernels import cuda_runtime
from fastsd_kernels.cuda_runtime import ELEMENTS, MAX_BLOCKS, VECTOR_BYTES, Launch, of_one_dtype
from fastsd_kernels.linear import out_features
from fastsd_kernels.rows import as_rows

SOURCE = "linear.cu"
DTYPES = (torch.float16, torch.bfloat16)
MAX_WIDTH = 2**30  # of a row, and rows of the weight; keeps their numbers within 32 bits

_WARP = 32
_WARP_ROWS = 32
_MOMENTS_THREADS = 256
_STAGES = 3  # steps that have room in shared memory: two are on their way while one is multiplied
# Those that are not part of the variant
_ACTIVATE = {"gelu": 1, "quick_gelu": 2}
# What tiles may cover, relative to what the best suited ones would: the rest of it is work on nothing
_MAX_COVERED = 9 / 8


@dataclass(frozen=True)
class Tile:
    """What a block multiplies: ``rows`` of x and ``weights``, rows of the weight, of which a warp has ``warp_weights``.

    With gates, half of those rows are of values and half of gates.
    """

    rows: int
    weights: int
    warp_weights: int

    @property
    def threads(self) -> int:
        return self.rows // _WARP_ROWS * (self.weights // self.warp_weights) * _WARP

    def count(self, rows: int, weights: int) -> int:
        return math.ceil(rows / self.rows) * math.ceil(weights / self.weights)

    def shared_bytes(self, step: int) -> int:
        """Of moments and biases; and of the stages, or of the warps' scratch."""
        stages = _STAGES * (self.rows + self.weights) * step * 2
        scratch = self.threads // _WARP * 16 * (self.warp_weights + 8) * 4
        return 4 * (2 * self.rows + self.weights) + max(stages, scratch)


# the largest first
_TILES = (
    Tile(128, 128, 64),
    Tile(128, 64, 32),
    Tile(64, 64, 32),
    Tile(32, 64, 32),
    Tile(32, 32, 32),
    Tile(32, 16, 16),
)


@dataclass(frozen=True)
class Plan:
    """The launches of one call."""

    defines: tuple[str, ...]
    moments: Launch  # where there is a norm
    project: Launch


def tile_for(rows: int, weights: int, multiprocessors: int) -> Tile:
    """The largest tile that wastes little of its work, and of which there is one for each multiprocessor."""

    def covered(tile: Tile) -> int:
        return tile.count(rows, weights) * tile.rows * tile.weights

    most = _MAX_COVERED * min(map(covered, _TILES))
    suited = [tile for tile in _TILES if covered(tile) <= most]
    return next((tile for tile in suited if tile.count(rows, weights) >= multiprocessors), suited[-1])


@functools.lru_cache(maxsize=1024)
def plan(
    *,
    rows: int,
    width: int,
    features: int,
    gated: bool,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    alignment: int,
    out_alignment: int,
    multiprocessors: int,
) -> Plan:
    """The launches for a result that is not empty.

    Args:
        width: K. features: N, half of the weight's rows if it is ``gated``.
        alignment: bytes that the addresses of x and weight, and the distances between their rows, are a multiple of.
        out_alignment: the same of residual and result.
        multiprocessors: of the card; tiles are made smaller until there is one for each of them.
    """

    def vector(alignment: int, *rows: int) -> int:
        return math.gcd(alignment // dtype.itemsize, VECTOR_BYTES // dtype.itemsize, *rows)

    parts = 2 if gated else 1
    tile = tile_for(rows, parts * features, multiprocessors)
    step = 16 if width <= 16 else 32
    rows_of_block = _MOMENTS_THREADS // _WARP
    return Plan(
        defines=(
            f"DTYPE={ELEMENTS[dtype]}",
            f"PARAMETER_DTYPE={ELEMENTS[parameter_dtype]}",
            f"VECTOR={vector(alignment, width)}",
            f"OUT_VECTOR={vector(out_alignment, features)}",
            f"GATED={int(gated)}",
            f"TILE_ROWS={tile.rows}",
            f"TILE_FEATURES={tile.weights // parts}",
            f"WARP_FEATURES={tile.warp_weights // parts}",
            f"STEP={step}",
            f"STAGES={_STAGES}",
        ),
        moments=Launch("linear_moments", (math.ceil(rows / rows_of_block), 1, 1), (_MOMENTS_THREADS, 1, 1), 0),
        project=Launch(
            "linear_project",
            (tile.count(rows, parts * features), 1, 1),
            (tile.threads, 1, 1),
            tile.shared_bytes(step),
        ),
    )


def unavailable() -> str | None:
    return cuda_runtime.unavailable()


def reject(x: Tensor, weight: Tensor, *args: object) -> str | None:
    if x.device.type != "cuda":
        return f"x is on {x.device}; the cuda backend needs CUDA tensors"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; the cuda backend takes float16 and bfloat16; backend='triton' takes float32"
    if max(weight.shape) > MAX_WIDTH:
        return f"weight is {weight.shape[0]} by {weight.shape[1]}; the cuda backend takes up to {MAX_WIDTH} of each"
    # the most blocks that plan() may ask for
    rows = x.shape[:-1].numel()
    blocks = max(_TILES[-1].count(rows, weight.shape[0]), math.ceil(rows / (_MOMENTS_THREADS // _WARP)))
    if blocks > MAX_BLOCKS:
        return (
            f"x has {rows} rows for {weight.shape[0]} of the weight, which take {blocks} blocks; "
            f"the cuda backend takes up to {MAX_BLOCKS}"
        )
    return None


def run(x: Tensor, *args: object) -> Tensor:
    return compute(cuda_runtime.launch, cuda_runtime.multiprocessors(x.device), x, *args)  # type: ignore[arg-type]


def compute(
    launch: Callable[..., None],
    multiprocessors: int,
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N or 2 N, K]
    bias: Tensor | None,  # [N or 2 N]
    norm_weight: Tensor | None,  # [K]
    norm_bias: Tensor | None,  # [K]
    norm_eps: float | None,
    activation: str,
    residual: Tensor | None,  # [..., N]
) -> Tensor:  # [..., N]
    """The op through ``launch``, which is :func:`fastsd_kernels.cuda_runtime.launch` or works as it does."""
    features = out_features(weight, activation)
    out = x.new_empty((*x.shape[:-1], features))
    if out.numel() == 0:
        return out

    x, weight = as_rows(x), as_rows(weight)
    residual = None if residual is None else as_rows(residual)
    bias, norm_weight, norm_bias = of_one_dtype(bias, norm_weight, norm_bias)
    norm_weight, norm_bias = _aligned(norm_weight), _aligned(norm_bias)
    rows, width = x.shape
    p = plan(
        rows=rows,
        width=width,
        features=features,
        gated=activation == "geglu",
        dtype=x.dtype,
        parameter_dtype=next((p.dtype for p in (bias, norm_weight, norm_bias) if p is not None), torch.float32),
        alignment=_alignment(x, weight),
        out_alignment=_alignment(residual, out.view(rows, features)),
        multiprocessors=multiprocessors,
    )

    def start(kernel: Launch, args: list[Tensor | int | float | None]) -> None:
        launch(
            SOURCE,
            kernel.kernel,
            p.defines,
            device=x.device,
            grid=kernel.grid,
            block=kernel.block,
            shared_bytes=kernel.shared_bytes,
            args=args,
        )

    moments = None
    if norm_eps is not None:
        moments = x.new_empty((rows, 2), dtype=torch.float32)  # mean, 1 / deviation
        start(p.moments, [x, moments, rows, width, x.stride(0), norm_eps])
    residual_stride = 0 if residual is None else residual.stride(0)
    sizes = [rows, width, features, x.stride(0), weight.stride(0), residual_stride]
    start(
        p.project,
        [x, weight, moments, norm_weight, norm_bias, bias, residual, out, *sizes, _ACTIVATE.get(activation, 0)],
    )
    return out


def _alignment(*matrices: Tensor | None) -> int:
    """Bytes that all addresses, and all distances between rows, are a multiple of."""
    strides = [m.stride(0) * m.element_size() for m in matrices if m is not None and m.shape[0] > 1]
    return math.gcd(cuda_runtime.alignment(*matrices), *strides)


def _aligned(parameter: Tensor | None) -> Tensor | None:
    """``parameter`` where vectors of it can be read, else a copy."""
    if parameter is None or cuda_runtime.alignment(parameter) == VECTOR_BYTES:
        return parameter
    return parameter.clone()
