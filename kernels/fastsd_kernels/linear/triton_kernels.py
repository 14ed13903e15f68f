"""The two Triton kernels of linear: the moments of rows, and the product with what surrounds it.

A program of ``project`` computes a tile ``[BLOCK_M rows, BLOCK_N features]`` of the result in steps of ``BLOCK_K``
channels, and normalises a tile of x as it loads it. For geglu it sums up the gates beside the values, so that neither
exists in memory.
"""

# Triton gives the arguments their types at the launch
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsd_kernels.group_norm_silu.triton_kernels import merge_two, moments

# Tiles of rows that run side by side share the weights that they read; not measured
ROWS_SIDE_BY_SIDE = tl.constexpr(8)
SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def row_moments(
    x_ptr,  # [M, K]
    moments_ptr,  # out: mean and 1/sqrt(variance + eps) of each row [2, M], float32
    eps,
    x_row,  # elements from one row to the next
    rows,
    channels,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    count = 0.0
    mean = tl.zeros([BLOCK_M], tl.float32)
    m2 = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, channels, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        k_inside = inside[:, None] & (k < channels)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_row + k[None, :], mask=k_inside, other=0.0)
        tile_count = tl.minimum(channels - first, BLOCK_K).to(tl.float32)
        tile_mean, tile_m2 = moments(x.to(tl.float32), k_inside, tile_count, axis=1)
        count, mean, m2 = merge_two(count, mean, m2, tile_count, tile_mean, tile_m2)
    tl.store(moments_ptr + row, mean, mask=inside)
    tl.store(moments_ptr + rows + row, tl.rsqrt(m2 / channels + eps), mask=inside)


@triton.jit
def gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * SQRT_HALF))


@triton.jit
def load_vector(ptr, i, inside):
    return tl.load(ptr + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def project(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K], for geglu [2 N, K]: values, then gates
    bias_ptr,  # [N] or [2 N], or None
    moments_ptr,  # [2, M] from row_moments, or None
    norm_weight_ptr,  # [K] or None
    norm_bias_ptr,  # [K] or None
    residual_ptr,  # [M, N] or None
    y_ptr,  # out: [M, N], contiguous
    x_row,  # elements from one row to the next
    weight_row,
    weight_column,  # elements from one channel to the next
    residual_row,
    rows,  # M
    channels,  # K
    features,  # N
    row_tiles,
    column_tiles,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    # one grid axis: the other two end at 65 535
    program = tl.program_id(0)
    row_tile, column_tile = tl.swizzle2d(
        program // column_tiles, program % column_tiles, row_tiles, column_tiles, ROWS_SIDE_BY_SIDE
    )
    # 64 bits: a tensor may hold more than 2³¹ elements
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, n_inside = row < rows, n < features
    x_ptrs = x_ptr + row[:, None] * x_row
    weight_ptrs = weight_ptr + n.to(tl.int64)[None, :] * weight_row
    if ACTIVATION == "geglu":
        gate_weight_ptrs = weight_ptrs + tl.cast(features, tl.int64) * weight_row
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if moments_ptr is not None:
        mean = load_vector(moments_ptr, row, row_inside)
        rstd = load_vector(moments_ptr + rows, row, row_inside)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, channels, BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)
        k_inside = k < channels
        u = tl.load(x_ptrs + k[None, :], mask=row_inside[:, None] & k_inside[None, :], other=0.0)
        offsets = k.to(tl.int64)[:, None] * weight_column
        w_inside = k_inside[:, None] & n_inside[None, :]
        w = tl.load(weight_ptrs + offsets, mask=w_inside, other=0.0)
        if moments_ptr is not None:
            z = (u.to(tl.float32) - mean[:, None]) * rstd[:, None]
            if norm_weight_ptr is not None:
                z *= load_vector(norm_weight_ptr, k, k_inside)[None, :]
            if norm_bias_ptr is not None:
                z += load_vector(norm_bias_ptr, k, k_inside)[None, :]
            # what stands beyond the channels may be infinite in 16 bits, and no weight of 0 would undo that
            u = tl.where(k_inside[None, :], z, 0.0).to(x_ptr.dtype.element_ty)
        total = tl.dot(u, w, total, input_precision="ieee")
        if ACTIVATION == "geglu":
            w = tl.load(gate_weight_ptrs + offsets, mask=w_inside, other=0.0)
            gate = tl.dot(u, w, gate, input_precision="ieee")

    if bias_ptr is not None:
        total += load_vector(bias_ptr, n, n_inside)[None, :]
    if ACTIVATION == "gelu":
        total = gelu(total)
    elif ACTIVATION == "quick_gelu":
        total /= 1.0 + tl.exp(-1.702 * total)
    elif ACTIVATION == "geglu":
        if bias_ptr is not None:
            gate += load_vector(bias_ptr + features, n, n_inside)[None, :]
        total *= gelu(gate)
    inside = row_inside[:, None] & n_inside[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + row[:, None] * residual_row + n[None, :]
        total += tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + row[:, None] * features + n[None, :]
    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=inside)
