"""The CUDA C++ backend; kernels in ``csrc/cuda/conv2d.cu``.

``"direct"`` is :mod:`fastsd_kernels.conv2d.composed`: cuDNN between this library's passes. ``"implicit_gemm"`` is one
kernel behind the statistics of the norm; norm, activation, concatenation and enlargement exist in shared memory only.

It works on channels-last maps: ``x``, ``skip`` or ``residual`` of another layout are copied once, and the result is
copied back to the layout of ``x``. Weights are read as ``[K, R·R, C]``, which channels-last weights are; others are
copied at each call, as are those whose channels, of ``x`` or of ``skip``, are no multiple of 8.

A convolution can note the :class:`Moments` of its result while that is in registers, and a norm that follows needs no
pass over the map. Where the input channels are split, no block has a whole sum, and nothing is noted.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels import cuda_runtime
from fastsd_kernels.conv2d import composed, measured
from fastsd_kernels.cuda_runtime import ELEMENTS, MAX_BLOCKS, VECTOR_BYTES, Launch, alignment, of_one_dtype
from fastsd_kernels.group_norm_silu import cuda_impl as group_norm
from fastsd_kernels.layout import dense, empty_map, is_channels_last, is_dense, output_size

SOURCE = "conv2d.cu"
DTYPES = (torch.float16, torch.bfloat16)

_WARP = 32
_WARP_POSITIONS = 32
_COLUMN = 8  # channels that lie together in shared memory
_REDUCE_THREADS = 256
_BLOCKS_PER_MULTIPROCESSOR = 2
_MAX_SPLITS = 16  # of the input channels; each costs the workspace the result's size in float32
_SPLIT_PRODUCTS = 8  # taps of a step that a split has at least, so that loads stay ahead of products
# What tiles may cover, relative to what the best suited ones would: the rest of it is work on nothing
_MAX_POSITIONS_COVERED = 5 / 4
_MAX_CHANNELS_COVERED = 9 / 8
_TILE_SIZES = ((8, 16), (1, 128), (8, 8), (1, 64), (4, 8), (1, 32))  # positions, the largest tiles first
_TILE_CHANNELS = (128, 64, 32, 16)


@dataclass(frozen=True)
class Tile:
    """What a block computes: ``height`` × ``width`` positions of a sample, ``channels`` of the result."""

    height: int
    width: int
    channels: int
    warp_channels: int

    @property
    def threads(self) -> int:
        return self.height * self.width // _WARP_POSITIONS * (self.channels // self.warp_channels) * _WARP

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a warp's positions."""
        width = min(self.width, _WARP_POSITIONS)
        return _WARP_POSITIONS // width, width

    def count(self, channels: int, height: int, width: int) -> int:
        """Tiles of one sample of the result."""
        return math.ceil(channels / self.channels) * math.ceil(height / self.height) * math.ceil(width / self.width)

    def shared_bytes(self, kernel: int, stride: int, step: int) -> int:
        """Of two halos and two taps' weights, or of the warps' scratch; and of one number per output channel."""
        halo = ((self.height - 1) * stride + kernel) * ((self.width - 1) * stride + kernel)
        scratch = self.threads // _WARP * 16 * (self.warp_channels + 8) * 4
        return max(2 * (halo + self.channels) * step * 2, scratch) + 4 * self.channels


@dataclass(frozen=True)
class Plan:
    """The launches of one call."""

    defines: tuple[str, ...]
    coefficients: Launch
    convolve: Launch
    reduce: Launch
    splits: int  # of the input channels; with one, the workspace and the last launch are not needed
    patch: tuple[int, int] | None  # height and width of those whose moments are noted; None where none are


@dataclass(frozen=True)
class Moments:
    """Of each channel over each patch of a map: the mean, and the sum of squared deviations from it."""

    values: Tensor  # [B, patches of rows, patches of columns, C, 2], float32
    patch: tuple[int, int]  # height and width; less at the map's edges
    map_width: int  # of the map in patches: to a pointwise convolution it is one row


@functools.lru_cache(maxsize=1024)
def tile_for(stride: int, out_channels: int, out_height: int, out_width: int) -> Tile:
    """The largest tile that neither wastes much of its work at the map's edges, nor shared memory on its halo."""
    # at stride 2 the halo of 8 × 16 positions would fill a multiprocessor with one block
    sizes = [(height, width) for height, width in _TILE_SIZES if stride == 1 or height * width < 128]

    def covered(size: tuple[int, int]) -> int:
        return math.ceil(out_height / size[0]) * math.ceil(out_width / size[1]) * size[0] * size[1]

    def covered_channels(channels: int) -> int:
        return math.ceil(out_channels / channels) * channels

    most = _MAX_POSITIONS_COVERED * min(map(covered, sizes))
    height, width = next(size for size in sizes if covered(size) <= most)
    most = _MAX_CHANNELS_COVERED * min(map(covered_channels, _TILE_CHANNELS))
    channels = next(channels for channels in _TILE_CHANNELS if covered_channels(channels) <= most)
    warp_channels = 64 if channels == 128 and height * width == 128 else min(channels, 32)
    return Tile(height, width, channels, warp_channels)


@functools.lru_cache(maxsize=1024)
def plan(
    *,
    batch: int,
    x_channels: int,
    skip_channels: int,
    num_groups: int,
    kernel: int,
    stride: int,
    out_channels: int,
    out_height: int,
    out_width: int,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    alignment: int,
    out_alignment: int,
    multiprocessors: int,
    moments: bool = False,
) -> Plan:
    """The launches for a result that is not empty.

    Args:
        alignment: bytes that the addresses of x and skip are a multiple of.
        out_alignment: the same of residual and result.
        multiprocessors: of the card; the input channels are split until the grid is wide enough for all of them.
        moments: whether those of the result are wanted; they are noted only if the input channels are not split.
    """

    def vector(alignment: int, *rows: int) -> int:
        return math.gcd(alignment // dtype.itemsize, VECTOR_BYTES // dtype.itemsize, *rows)

    tile = tile_for(stride, out_channels, out_height, out_width)
    step = 16 if max(x_channels, skip_channels) <= 16 else 32
    out_vector = vector(out_alignment, out_channels)

    tiles = batch * tile.count(out_channels, out_height, out_width)
    steps = math.ceil(x_channels / step) + math.ceil(skip_channels / step)
    wanted = min(_BLOCKS_PER_MULTIPROCESSOR * multiprocessors // tiles, _MAX_SPLITS)
    splits = max(1, min(wanted, steps * kernel * kernel // _SPLIT_PRODUCTS, steps))
    patch = tile.patch if moments and splits == 1 else None
    vectors = batch * out_height * out_width * out_channels // out_vector
    return Plan(
        defines=(
            f"DTYPE={ELEMENTS[dtype]}",
            f"PARAMETER_DTYPE={ELEMENTS[parameter_dtype]}",
            f"VECTOR={vector(alignment, x_channels, skip_channels)}",
            f"OUT_VECTOR={out_vector}",
            f"KERNEL_SIZE={kernel}",
            f"STRIDE={stride}",
            f"TILE_H={tile.height}",
            f"TILE_W={tile.width}",
            f"TILE_K={tile.channels}",
            f"WARP_K={tile.warp_channels}",
            f"STEP={step}",
            f"MOMENTS={int(patch is not None)}",
        ),
        coefficients=Launch("conv2d_coefficients", (batch * num_groups, 1, 1), (_WARP, 1, 1), 0),
        convolve=Launch(
            "conv2d_implicit_gemm",
            (tiles * splits, 1, 1),
            (tile.threads, 1, 1),
            tile.shared_bytes(kernel, stride, step),
        ),
        reduce=Launch("conv2d_reduce", (math.ceil(vectors / _REDUCE_THREADS), 1, 1), (_REDUCE_THREADS, 1, 1), 0),
        splits=splits,
        patch=patch,
    )


def unavailable() -> str | None:
    return cuda_runtime.unavailable()


def reject(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    skip: Tensor | None,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor | None,
    activation: str,
    upsample_size: Sequence[int] | None,
    *args: object,
) -> str | None:
    algorithm = args[-1]
    if x.device.type != "cuda":
        return f"x is on {x.device}; the cuda backend needs CUDA tensors"
    if algorithm not in (None, "direct", "implicit_gemm"):
        return f"algorithm is {algorithm!r}; the cuda backend has 'direct' and 'implicit_gemm'"
    if algorithm != "implicit_gemm":
        return None
    if x.dtype not in DTYPES:
        return (
            f"x is {x.dtype}; implicit_gemm takes float16 and bfloat16, as tensor cores would round others to 10 bits; "
            "use algorithm='direct'"
        )
    size = output_size(upsample_size or x.shape[2:], weight.shape[2], stride, padding)
    return reject_size(x.shape[0], weight.shape[1], weight.shape[0], stride, size)


def reject_size(batch: int, channels: int, out_channels: int, stride: int, size: tuple[int, int]) -> str | None:
    """Why ``implicit_gemm`` cannot compute a result of that height and width, or ``None``."""
    tiles = tile_for(stride, max(1, out_channels), *(max(1, s) for s in size))
    blocks = batch * max(tiles.count(out_channels, *size), channels)
    if blocks > MAX_BLOCKS:
        return f"x has {batch} samples, which take {blocks} blocks; implicit_gemm takes up to {MAX_BLOCKS}"
    return None


def chosen(x: Tensor, weight: Tensor, stride: int, padding: Sequence[int], upsample_size: Sequence[int] | None) -> str:
    """The algorithm that ``None`` stands for: ``"implicit_gemm"`` where it was measured to be the fastest."""
    if x.dtype in DTYPES and measured.fastest(x, weight, stride, padding, upsample_size) == measured.IMPLICIT_GEMM:
        return "implicit_gemm"
    return "direct"


def run(x: Tensor, weight: Tensor, *args: object) -> Tensor:
    *rest, algorithm = args
    if (algorithm or chosen(x, weight, rest[1], rest[2], rest[11])) == "implicit_gemm":  # type: ignore[arg-type]
        return compute(cuda_runtime.launch, cuda_runtime.multiprocessors(x.device), x, weight, *rest)
    return composed.run(x, weight, *rest)  # type: ignore[arg-type]


def compute(launch: Callable[..., None], multiprocessors: int, x: Tensor, weight: Tensor, *args: object) -> Tensor:
    """``implicit_gemm`` alone: the result of :func:`convolve`."""
    return convolve(launch, multiprocessors, x, weight, *args)[0]  # type: ignore[arg-type]


def convolve(
    launch: Callable[..., None],
    multiprocessors: int,
    x: Tensor,  # [B, C1, H, W]
    weight: Tensor,  # [K, C, R, R] or [B, K, C, R, R], C = C1 + C2
    bias: Tensor | None,  # [K]
    stride: int,
    padding: Sequence[int],  # left, right, top, bottom
    skip: Tensor | None,  # [B, C2, H, W]
    num_groups: int,
    norm_weight: Tensor | None,  # [C] or [B, C]
    norm_bias: Tensor | None,  # [C] or [B, C]
    eps: float,
    mean: Tensor | None,  # [B, num_groups]
    rstd: Tensor | None,  # [B, num_groups]
    activation: str,
    upsample_size: Sequence[int] | None,  # height, width
    channel_bias: Tensor | None,  # [B, K] or [1, K]
    residual: Tensor | None,  # [B, K, H', W']
    output_scale: float,
    *,
    moments_of_x: Moments | None = None,
    note_moments: bool = False,
) -> tuple[Tensor, Moments | None]:  # [B, K, H', W']
    """``implicit_gemm`` through ``launch``, which is :func:`fastsd_kernels.cuda_runtime.launch` or works as it does.

    Args:
        moments_of_x: noted by the convolution that made ``x``; in place of ``mean`` and ``rstd``, without ``skip``.
        note_moments: return the result's moments, unless the input channels are split; for a result without
            ``residual`` and ``output_scale``.
    """
    batch, x_channels, height, width = x.shape
    out_channels, channels, kernel, _ = weight.shape[-4:]
    skip_channels = channels - x_channels
    enlarged_height, enlarged_width = upsample_size or (height, width)
    out_height, out_width = output_size((enlarged_height, enlarged_width), kernel, stride, padding)
    result = empty_map(x, out_channels, is_channels_last(x), (out_height, out_width))
    if result.numel() == 0:
        return result, None

    out = result if is_dense(result, True) else empty_map(x, out_channels, True, (out_height, out_width))
    x = dense(x, True)
    skip = None if skip is None else dense(skip, True)
    residual = None if residual is None else dense(residual, True)
    norm_weight, norm_bias, bias, channel_bias = of_one_dtype(norm_weight, norm_bias, bias, channel_bias)
    left, _, top, _ = padding
    factors = [1.0 if to == of else of / to for of, to in ((height, enlarged_height), (width, enlarged_width))]
    if (kernel, stride, *padding) == (1, 1, 0, 0, 0, 0) and upsample_size is None and height * width < 2**31:
        # positions that know no neighbours are one row
        height, width = enlarged_height, enlarged_width = out_height, out_width = 1, height * width
    p = plan(
        batch=batch,
        x_channels=x_channels,
        skip_channels=skip_channels,
        num_groups=num_groups,
        kernel=kernel,
        stride=stride,
        out_channels=out_channels,
        out_height=out_height,
        out_width=out_width,
        dtype=x.dtype,
        parameter_dtype=next(
            (p.dtype for p in (norm_weight, norm_bias, bias, channel_bias) if p is not None), torch.float32
        ),
        alignment=alignment(x, skip),
        out_alignment=alignment(residual, out),
        multiprocessors=multiprocessors,
        moments=note_moments,
    )

    start = functools.partial(start_on, launch, x.device)
    packed = _packed(weight, x_channels)
    coefficients = None
    if num_groups and height * width:
        norm = (num_groups, norm_weight, norm_bias, eps, mean, rstd, moments_of_x)
        coefficients = norm_coefficients(start, multiprocessors, p, x, skip, *norm)

    channel_bias_stride = 0 if channel_bias is None or channel_bias.shape[0] == 1 else out_channels
    workspace = None
    if p.splits > 1:
        row = math.ceil(out_channels / _COLUMN) * _COLUMN
        workspace = x.new_empty((p.splits, batch, out_height, out_width, row), dtype=torch.float32)
    moments = None
    if p.patch is not None:
        patches = (math.ceil(out_height / p.patch[0]), math.ceil(out_width / p.patch[1]))
        moments = Moments(x.new_empty((batch, *patches, out_channels, 2), dtype=torch.float32), p.patch, out_width)
    start(
        SOURCE,
        p.convolve,
        p.defines,
        [
            *(x, skip, packed, coefficients, bias, channel_bias, residual, out, workspace),
            None if moments is None else moments.values,
            *(batch, x_channels, skip_channels, height, width, enlarged_height, enlarged_width, left, top),
            *(out_channels, out_height, out_width, 0 if weight.dim() == 4 else packed[0].numel()),
            *(channel_bias_stride, p.splits, int(activation == "silu")),
            *(*factors, output_scale),
        ],
    )
    if p.splits > 1:
        sizes = [batch, out_height * out_width, out_channels, channel_bias_stride, p.splits]
        start(SOURCE, p.reduce, p.defines, [workspace, bias, channel_bias, residual, out, *sizes, output_scale])
    return result if out is result else result.copy_(out), moments


def norm_coefficients(
    start: Callable[..., None],  # start_on, with its launch and its device
    multiprocessors: int,
    p: Plan,
    x: Tensor,  # [B, C1, H, W], dense in channels last
    skip: Tensor | None,  # [B, C2, H, W], likewise
    num_groups: int,
    norm_weight: Tensor | None,  # [C] or [B, C], of the plan's dtype
    norm_bias: Tensor | None,  # [C] or [B, C]
    eps: float,
    mean: Tensor | None = None,  # [B, num_groups]
    rstd: Tensor | None = None,  # [B, num_groups]
    moments: Moments | None = None,
) -> Tensor:
    """Center, scale and offset ``[B, 3, C']``, the channels of x and those of skip each padded to a multiple of 8."""
    x_channels, skip_channels = x.shape[1], 0 if skip is None else skip.shape[1]
    padded = sum(math.ceil(channels / _COLUMN) * _COLUMN for channels in (x_channels, skip_channels))
    coefficients = x.new_empty((x.shape[0], 3, padded), dtype=torch.float32)
    statistics, cut = _statistics(start, multiprocessors, x, skip, num_groups, mean, rstd, moments)
    strides = [0 if q is None or q.dim() == 1 else x_channels + skip_channels for q in (norm_weight, norm_bias)]
    sizes = [x_channels, skip_channels, x.shape[2:].numel(), num_groups, *strides, *cut]
    start(SOURCE, p.coefficients, p.defines, [*statistics, norm_weight, norm_bias, coefficients, *sizes, eps])
    return coefficients


def _statistics(
    start: Callable[..., None],
    multiprocessors: int,
    x: Tensor,
    skip: Tensor | None,
    num_groups: int,
    mean: Tensor | None,
    rstd: Tensor | None,
    moments: Moments | None,
) -> tuple[list[Tensor | None], list[int]]:
    """The statistics as conv2d_coefficients takes them: partial ones, moments, mean and rstd; and how they are cut."""
    if mean is not None and rstd is not None:
        return [None, None, mean.float().contiguous(), rstd.float().contiguous()], [0] * 6
    if moments is not None:
        return [None, moments.values, None, None], [0, 0, 0, moments.map_width, *moments.patch]
    x_channels, skip_channels, space = x.shape[1], 0 if skip is None else skip.shape[1], x.shape[2:].numel()
    p = group_norm.plan(
        batch=x.shape[0],
        x_channels=x_channels,
        skip_channels=skip_channels,
        space=space,
        num_groups=num_groups,
        channels_last=True,
        dtype=x.dtype,
        parameter_dtype=torch.float32,
        alignment=alignment(x, skip),
        multiprocessors=multiprocessors,
    )
    partials = x.new_empty((x.shape[0], num_groups, p.splits, 3), dtype=torch.float32)  # mean, residue, M2
    cut = [p.tile, p.chunk, p.chunks]
    sizes = [x_channels, skip_channels, space, num_groups, 0]
    start(group_norm.SOURCE, p.stats, p.defines, [x, skip, None, partials, *sizes, *cut])
    return [partials, None, None, None], [*cut, 0, 0, 0]


def start_on(
    launch: Callable[..., None],
    device: torch.device,
    source: str,
    kernel: Launch,
    defines: tuple[str, ...],
    args: list[Tensor | int | float | None],
) -> None:
    """Launch a kernel of a plan."""
    launch(
        source,
        kernel.kernel,
        defines,
        device=device,
        grid=kernel.grid,
        block=kernel.block,
        shared_bytes=kernel.shared_bytes,
        args=args,
    )


def _packed(weight: Tensor, x_channels: int) -> Tensor:
    """Weights ``[K, R·R, C']``, the channels of x and those of skip each padded with zeros to a multiple of 8.

    As many for each sample, if the weights begin with a batch.
    """
    rows = weight.flatten(-2).movedim(-2, -1)
    skip_channels = rows.shape[-1] - x_channels
    if x_channels % _COLUMN == 0 and skip_channels % _COLUMN == 0:
        packed = rows.contiguous()
        return packed if alignment(packed) == VECTOR_BYTES else packed.clone()
    parts = rows.split([x_channels, skip_channels], -1)
    return torch.cat([F.pad(part, (0, -part.shape[-1] % _COLUMN)) for part in parts], -1).contiguous()
