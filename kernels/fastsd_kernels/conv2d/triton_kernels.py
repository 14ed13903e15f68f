"""The Triton kernels of conv2d: coefficients of the norm, the convolution as an implicit product, the sum of splits.

The convolution is a product of ``[positions, R²·C]`` by ``[R²·C, K]`` for each sample; its left factor, the patches of
the normalised, activated, enlarged and padded map, exists only as tiles. A program computes a tile
``[BLOCK_M positions of one sample, BLOCK_N channels]`` of the result in steps: a step is ``BLOCK_K`` input channels at
one tap of the kernel. The taps of the same channels follow each other, so that the map's lines are found in the caches,
and all of ``x``'s channels come before ``skip``'s, so that no step straddles the two.

All maps are channels last and dense, the weight is ``[K, R, R, C]``, and the result has strides of its own.

Samples may have weights of their own, one after another in memory. Or each has a mixture by ``alpha`` of several
weights, the experts: a step then mixes their tiles, or (``CONCAT``) adds up a product with each, the map times alpha.
"""

# Triton gives the arguments their types at the launch
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsd_kernels.group_norm_silu.triton_kernels import channel_statistics, channel_tile, moments

# Tiles of positions that run side by side share the weights that they read; not measured
ROWS_SIDE_BY_SIDE = tl.constexpr(8)


@triton.jit
def store_coefficients(
    center,
    scale,
    weight_ptr,
    bias_ptr,
    coefficients_ptr,
    sample,
    c,
    inside,
    channels,
    weight_stride,
    bias_stride,
):
    """Store what a norm with this mean and 1/deviation does to the channels ``c``; all three ``[len(c)]``."""
    offset = tl.zeros_like(center)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + sample * weight_stride + c, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        offset += tl.load(bias_ptr + sample * bias_stride + c, mask=inside, other=0.0).to(tl.float32)
    coefficients_ptrs = coefficients_ptr + sample * 3 * channels + c
    tl.store(coefficients_ptrs, center, mask=inside)
    tl.store(coefficients_ptrs + channels, scale, mask=inside)
    tl.store(coefficients_ptrs + 2 * channels, offset, mask=inside)


@triton.jit
def norm_coefficients(
    parts_ptr,  # [B, splits * TILES_PER_GROUP, 2, G], from group_statistics; None where mean and rstd are given
    mean_ptr,  # [B, G] or None
    rstd_ptr,  # [B, G] or None
    weight_ptr,  # [C] or [B, C], or None
    bias_ptr,  # [C] or [B, C], or None
    coefficients_ptr,  # out: center, scale and offset [B, 3, C], float32
    eps,
    channels,
    space,
    weight_stride,  # elements from one sample to the next; 0 where shared
    bias_stride,
    channel_tiles,
    splits,
    tiles_per_split,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS_PER_TILE: tl.constexpr,
    TILES_PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """What the norm does to each channel of each sample: ``(z - center) * scale + offset``."""
    program = tl.program_id(0)
    sample = (program // channel_tiles).to(tl.int64)
    tile = program % channel_tiles
    first_group, c, inside = channel_tile(tile, channels, GROUP_CHANNELS, GROUPS_PER_TILE, TILES_PER_GROUP, BLOCK_C)

    if parts_ptr is not None:
        center, scale = channel_statistics(
            parts_ptr,
            eps,
            sample,
            first_group,
            c,
            channels,
            space,
            splits,
            tiles_per_split,
            GROUP_CHANNELS,
            GROUPS_PER_TILE,
            TILES_PER_GROUP,
            BLOCK_C,
            BLOCK_S,
            BLOCK_G,
            BLOCK_P,
        )
    else:
        group = sample * (channels // GROUP_CHANNELS) + c // GROUP_CHANNELS
        center = tl.load(mean_ptr + group, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd_ptr + group, mask=inside, other=0.0).to(tl.float32)

    store_coefficients(
        center,
        scale,
        weight_ptr,
        bias_ptr,
        coefficients_ptr,
        sample,
        c,
        inside,
        channels,
        weight_stride,
        bias_stride,
    )


@triton.jit
def _nearest(position, scale, size):
    # as torch: the product rounded to float32, then down
    return tl.minimum(tl.floor(position.to(tl.float32) * scale).to(tl.int32), size - 1)


@triton.jit
def _mixture(expert_ptrs, expert_stride, alpha_ptr, inside, EXPERTS: tl.constexpr):
    """A tile of the experts' weights, mixed in float32."""
    mixture = tl.zeros(expert_ptrs.shape, tl.float32)
    for expert in tl.static_range(EXPERTS):
        tile = tl.load(expert_ptrs + expert * expert_stride, mask=inside, other=0.0)
        mixture += tl.load(alpha_ptr + expert) * tile.to(tl.float32)
    return mixture.to(expert_ptrs.dtype.element_ty)


@triton.jit
def _accumulate(
    accumulator,
    source_ptr,
    weight_ptr,
    alpha_ptr,
    coefficients_ptr,
    sample,
    row,
    column,
    p_inside,
    n,
    n_inside,
    first_channel,
    source_channels,
    channels,
    expert_stride,
    source_height,
    source_width,
    height,
    width,
    height_scale,
    width_scale,
    first_step,
    end_step,
    EXPERTS: tl.constexpr,
    CONCAT: tl.constexpr,
    SILU: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the steps from ``first_step`` to ``end_step`` over x or skip, whose channels begin at ``first_channel``.

    ``row`` and ``column`` ``[BLOCK_M]`` are where the patches begin in the enlarged map, negative in the padding.
    """
    source_ptr += sample * source_height * source_width * source_channels
    weight_ptrs = weight_ptr + n.to(tl.int64) * (KERNEL * KERNEL * channels) + first_channel
    if coefficients_ptr is not None:
        coefficients_ptr += sample * 3 * channels + first_channel

    for step in tl.range(first_step, end_step, num_stages=STAGES):
        tap = step % (KERNEL * KERNEL)
        c = step // (KERNEL * KERNEL) * BLOCK_K + tl.arange(0, BLOCK_K)
        c_inside = c < source_channels
        tap_row = row + tap // KERNEL
        tap_column = column + tap % KERNEL
        inside = p_inside & (tap_row >= 0) & (tap_row < height) & (tap_column >= 0) & (tap_column < width)
        if height_scale is not None:
            tap_row = _nearest(tap_row, height_scale, source_height)
            tap_column = _nearest(tap_column, width_scale, source_width)
        # 64 bits: a map may hold more than 2³¹ elements
        offsets = (tap_row.to(tl.int64) * source_width + tap_column) * source_channels
        u = tl.load(source_ptr + offsets[:, None] + c[None, :], mask=inside[:, None] & c_inside[None, :], other=0.0)
        w_ptrs = weight_ptrs[None, :] + (tap * channels + c)[:, None]
        w_inside = c_inside[:, None] & n_inside[None, :]
        if alpha_ptr is None:
            w = tl.load(w_ptrs, mask=w_inside, other=0.0)
        elif not CONCAT:
            w = _mixture(w_ptrs, expert_stride, alpha_ptr, w_inside, EXPERTS)
        if coefficients_ptr is not None or SILU or CONCAT:
            z = u.to(tl.float32)
            if coefficients_ptr is not None:
                center = tl.load(coefficients_ptr + c, mask=c_inside, other=0.0)
                scale = tl.load(coefficients_ptr + channels + c, mask=c_inside, other=0.0)
                offset = tl.load(coefficients_ptr + 2 * channels + c, mask=c_inside, other=0.0)
                z = (z - center[None, :]) * scale[None, :] + offset[None, :]
            if SILU:
                z = z / (1.0 + tl.exp(-z))
            # the padding is of zeros behind the norm
            z = tl.where(inside[:, None], z, 0.0)
            u = z.to(weight_ptr.dtype.element_ty)
        if CONCAT:
            for expert in tl.static_range(EXPERTS):
                u = (z * tl.load(alpha_ptr + expert)).to(weight_ptr.dtype.element_ty)
                w = tl.load(w_ptrs + expert * expert_stride, mask=w_inside, other=0.0)
                accumulator = tl.dot(u, w, accumulator, input_precision="ieee")
        else:
            accumulator = tl.dot(u, w, accumulator, input_precision="ieee")
    return accumulator


@triton.jit
def _finish(
    total,  # [BLOCK_M, len(n)]
    bias_ptr,
    channel_bias_ptr,
    residual_ptr,
    y_ptr,
    moments_ptr,
    channel_bias_stride,
    position_stride,
    channel_stride,
    output_scale,
    tile,
    n,
    positions,
    out_channels,
    row_tiles,
    BLOCK_M: tl.constexpr,
):
    """Add what is behind the product; store a tile of the result, and its moments."""
    sample = (tile // row_tiles).to(tl.int64)
    first = (tile % row_tiles).to(tl.int64) * BLOCK_M
    p = first + tl.arange(0, BLOCK_M)
    n_inside = n < out_channels
    inside = (p < positions)[:, None] & n_inside[None, :]
    offsets = (
        sample * positions * out_channels + p[:, None] * position_stride + n.to(tl.int64)[None, :] * channel_stride
    )
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    if channel_bias_ptr is not None:
        channel_bias_ptrs = channel_bias_ptr + sample * channel_bias_stride + n
        total += tl.load(channel_bias_ptrs, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        total += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = (total * output_scale).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=inside)
    if moments_ptr is not None:
        # of the rounded map, which is what a norm reads: a mean that it does not have would stay in each element
        count = tl.minimum(positions - first, BLOCK_M).to(tl.float32)
        mean, m2 = moments(tl.where(inside, y.to(tl.float32), 0.0), inside, count, axis=0)
        mean_ptrs = moments_ptr + tile.to(tl.int64) * (2 * out_channels) + n
        tl.store(mean_ptrs, mean, mask=n_inside)
        tl.store(mean_ptrs + out_channels, m2, mask=n_inside)


@triton.jit
def convolve(
    x_ptr,  # [B, H, W, C1]
    skip_ptr,  # [B, H, W, C2] or None
    weight_ptr,  # [K, KERNEL, KERNEL, C], C = C1 + C2; or one for each sample, or for each of EXPERTS experts
    alpha_ptr,  # of the experts in each sample's weight [B, EXPERTS] or [1, EXPERTS], float32; or None
    weight_stride,  # elements from one sample's or expert's weight to the next; None where all samples share one
    alpha_stride,  # elements from one sample to the next; 0 where shared
    coefficients_ptr,  # [B, 3, C] from norm_coefficients, or None
    bias_ptr,  # [K] or None
    channel_bias_ptr,  # [B, K] or [1, K], or None
    residual_ptr,  # [B, K, H', W'] with y's strides, or None
    y_ptr,  # out: [splits * B, K, H', W']: the result, or the sum of each split in float32, without the tensors above
    moments_ptr,  # out: mean and m2 of each channel of y over each tile's positions [B, row_tiles, 2, K], or None
    channel_bias_stride,
    position_stride,  # elements from one position of y to the next
    channel_stride,  # elements from one channel of y to the next
    output_scale,
    batch,
    x_channels,
    skip_channels,
    out_channels,
    source_height,  # H
    source_width,  # W
    height,  # of the enlarged map: H if it is not
    width,
    height_scale,  # H / height and W / width in float32, or None where the map is not enlarged
    width_scale,
    out_width,  # W'
    positions,  # H' * W'
    left,  # padding
    top,
    row_tiles,  # of a sample
    column_tiles,
    splits,
    steps_per_split,
    EXPERTS: tl.constexpr,
    CONCAT: tl.constexpr,
    SILU: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    columns = column_tiles * splits
    tile, column_split = tl.swizzle2d(
        program // columns, program % columns, batch * row_tiles, columns, ROWS_SIDE_BY_SIDE
    )
    sample = (tile // row_tiles).to(tl.int64)
    split = column_split // column_tiles
    p = (tile % row_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_split % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (p // out_width).to(tl.int32) * STRIDE - top
    column = (p % out_width).to(tl.int32) * STRIDE - left

    x_steps = tl.cdiv(x_channels, BLOCK_K) * (KERNEL * KERNEL)
    first_step = split * steps_per_split
    end_step = first_step + steps_per_split
    channels = x_channels
    if skip_ptr is not None:
        channels += skip_channels
    expert_stride = None
    if alpha_ptr is not None:
        alpha_ptr += sample * alpha_stride
        expert_stride = tl.cast(weight_stride, tl.int64)
    elif weight_stride is not None:
        weight_ptr += sample * weight_stride
    total = _accumulate(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
        x_ptr,
        weight_ptr,
        alpha_ptr,
        coefficients_ptr,
        sample,
        row,
        column,
        p < positions,
        n,
        n < out_channels,
        0,
        x_channels,
        channels,
        expert_stride,
        source_height,
        source_width,
        height,
        width,
        height_scale,
        width_scale,
        first_step,
        tl.minimum(end_step, x_steps),
        EXPERTS,
        CONCAT,
        SILU,
        KERNEL,
        BLOCK_K,
        STAGES,
    )
    if skip_ptr is not None:
        skip_steps = tl.cdiv(skip_channels, BLOCK_K) * (KERNEL * KERNEL)
        total = _accumulate(
            total,
            skip_ptr,
            weight_ptr,
            alpha_ptr,
            coefficients_ptr,
            sample,
            row,
            column,
            p < positions,
            n,
            n < out_channels,
            x_channels,
            skip_channels,
            channels,
            expert_stride,
            source_height,
            source_width,
            height,
            width,
            height_scale,
            width_scale,
            tl.maximum(first_step - x_steps, 0),
            tl.minimum(end_step - x_steps, skip_steps),
            EXPERTS,
            CONCAT,
            SILU,
            KERNEL,
            BLOCK_K,
            STAGES,
        )

    _finish(
        total,
        bias_ptr,
        channel_bias_ptr,
        residual_ptr,
        y_ptr,
        moments_ptr,
        channel_bias_stride,
        position_stride,
        channel_stride,
        output_scale,
        split * batch * row_tiles + tile,
        n,
        positions,
        out_channels,
        row_tiles,
        BLOCK_M,
    )


@triton.jit
def sum_splits(
    sums_ptr,  # [splits, B, H', W', K], float32
    bias_ptr,  # [K] or None
    channel_bias_ptr,  # [B, K] or [1, K], or None
    residual_ptr,  # [B, K, H', W'] with y's strides, or None
    y_ptr,  # out: [B, K, H', W']
    moments_ptr,  # out: mean and m2 of each channel of y over each tile's positions [B, row_tiles, 2, K], or None
    channel_bias_stride,
    position_stride,
    channel_stride,
    output_scale,
    out_channels,
    positions,
    row_tiles,
    column_tiles,
    splits,
    split_stride,  # elements from one split to the next
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum the splits of a convolution in their order, and finish its result."""
    program = tl.program_id(0)
    tile = program // column_tiles
    sample = (tile // row_tiles).to(tl.int64)
    p = (tile % row_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (p < positions)[:, None] & (n < out_channels)[None, :]
    sums_ptrs = sums_ptr + (sample * positions + p)[:, None] * out_channels + n[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(splits):
        total += tl.load(sums_ptrs, mask=inside, other=0.0)
        sums_ptrs += split_stride
    _finish(
        total,
        bias_ptr,
        channel_bias_ptr,
        residual_ptr,
        y_ptr,
        moments_ptr,
        channel_bias_stride,
        position_stride,
        channel_stride,
        output_scale,
        tile,
        n,
        positions,
        out_channels,
        row_tiles,
        BLOCK_M,
    )
