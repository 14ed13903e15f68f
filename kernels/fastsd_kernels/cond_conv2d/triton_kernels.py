"""The Triton kernels of cond_conv2d around the convolution, which is conv2d's: activation and sums, routing, mixing.

All maps are channels last and dense, and experts are ``[E, K, R, R, C]``.
"""

# Triton gives the arguments their types at the launch
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _activate(
    source_ptr,
    coefficients_ptr,
    u_ptr,
    sums_ptr,
    sample,
    tile,
    row_tiles,
    c,  # of the source
    first_channel,  # of the source in the concatenation
    source_channels,
    channels,
    positions,
    SILU: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A tile of u and its sums; the channels are of x or of skip."""
    p = tile.to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    c_inside = c < source_channels
    inside = (p < positions)[:, None] & c_inside[None, :]
    # 64 bits: a map may hold more than 2³¹ elements
    row = sample * positions + p
    z = tl.load(source_ptr + row[:, None] * source_channels + c[None, :], mask=inside, other=0.0)
    if u_ptr is not None:
        u = z.to(tl.float32)
        if coefficients_ptr is not None:
            coefficients_ptrs = coefficients_ptr + sample * 3 * channels + first_channel + c
            center = tl.load(coefficients_ptrs, mask=c_inside, other=0.0)
            scale = tl.load(coefficients_ptrs + channels, mask=c_inside, other=0.0)
            offset = tl.load(coefficients_ptrs + 2 * channels, mask=c_inside, other=0.0)
            u = (u - center[None, :]) * scale[None, :] + offset[None, :]
        if SILU:
            u = u / (1.0 + tl.exp(-u))
        z = u.to(u_ptr.dtype.element_ty)
        tl.store(u_ptr + row[:, None] * channels + first_channel + c[None, :], z, mask=inside)
    # of the rounded map, which is what is convolved
    total = tl.sum(tl.where(inside, z.to(tl.float32), 0.0), 0)
    tl.store(sums_ptr + (sample * row_tiles + tile) * channels + first_channel + c, total, mask=c_inside)


@triton.jit
def activate(
    x_ptr,  # [B, S, C1]
    skip_ptr,  # [B, S, C2] or None
    coefficients_ptr,  # [B, 3, C] from conv2d's norm_coefficients, or None
    u_ptr,  # out: [B, S, C]; None where u is z
    sums_ptr,  # out: of each channel of u over each tile's positions [B, row_tiles, C], float32
    x_channels,
    skip_channels,
    positions,
    row_tiles,
    x_tiles,  # of x's channels
    column_tiles,  # of x's and of skip's
    SILU: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // column_tiles // row_tiles).to(tl.int64)
    tile = program // column_tiles % row_tiles
    column = program % column_tiles
    channels = x_channels
    if skip_ptr is not None:
        channels += skip_channels
    if column < x_tiles:
        _activate(
            x_ptr,
            coefficients_ptr,
            u_ptr,
            sums_ptr,
            sample,
            tile,
            row_tiles,
            column * BLOCK_C + tl.arange(0, BLOCK_C),
            0,
            x_channels,
            channels,
            positions,
            SILU,
            BLOCK_S,
        )
    elif skip_ptr is not None:
        _activate(
            skip_ptr,
            coefficients_ptr,
            u_ptr,
            sums_ptr,
            sample,
            tile,
            row_tiles,
            (column - x_tiles) * BLOCK_C + tl.arange(0, BLOCK_C),
            x_channels,
            skip_channels,
            channels,
            positions,
            SILU,
            BLOCK_S,
        )


@triton.jit
def _routed(
    sums_ptr,
    weight_ptr,
    bias_ptr,
    sample,
    e,
    e_inside,
    channels,
    positions,
    row_tiles,
    SOFTMAX: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """``routing(R · mean(u) + r)`` of the experts ``e``, ``[BLOCK_E]``."""
    logits = tl.zeros([BLOCK_E], tl.float32)
    for first_channel in range(0, channels, BLOCK_C):
        c = first_channel + tl.arange(0, BLOCK_C)
        total = tl.zeros([BLOCK_C], tl.float32)
        for first_tile in range(0, row_tiles, BLOCK_T):
            tile = first_tile + tl.arange(0, BLOCK_T)
            present = (tile < row_tiles)[:, None] & (c < channels)[None, :]
            sums_ptrs = sums_ptr + (sample * row_tiles + tile)[:, None] * channels + c[None, :]
            total += tl.sum(tl.load(sums_ptrs, mask=present, other=0.0), 0)
        inside = e_inside[:, None] & (c < channels)[None, :]
        weight = tl.load(weight_ptr + e[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
        logits += tl.sum(weight * (total / positions)[None, :], 1)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + e, mask=e_inside, other=0.0).to(tl.float32)
    if SOFTMAX:
        logits = tl.where(e_inside, logits, float("-inf"))
        powers = tl.exp(logits - tl.max(logits, 0))
        return powers / tl.sum(powers, 0)
    else:
        return 1.0 / (1.0 + tl.exp(-logits))


@triton.jit
def route(
    sums_ptr,  # [B, row_tiles, C] from activate, or None without routing
    routing_weight_ptr,  # [E, C] or None
    routing_bias_ptr,  # [E] or None
    given_ptr,  # alpha [B, E] or [1, E], or None
    expert_biases_ptr,  # [E, K] or None
    channel_bias_ptr,  # [B, K] or [1, K], or None
    alpha_ptr,  # out: [B, E], float32
    rows_ptr,  # out: what is added to each channel [B, K], float32; or None
    given_stride,  # elements from one sample to the next; 0 where shared
    channel_bias_stride,
    channels,
    out_channels,
    positions,
    row_tiles,
    EXPERTS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """How much of each expert each sample gets, and the experts' biases mixed so; a program serves a sample."""
    sample = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    e_inside = e < EXPERTS
    alpha = tl.zeros([BLOCK_E], tl.float32)
    if given_ptr is not None:
        alpha += tl.load(given_ptr + sample * given_stride + e, mask=e_inside, other=0.0).to(tl.float32)
    if sums_ptr is not None:
        alpha += _routed(
            sums_ptr,
            routing_weight_ptr,
            routing_bias_ptr,
            sample,
            e,
            e_inside,
            channels,
            positions,
            row_tiles,
            SOFTMAX,
            BLOCK_E,
            BLOCK_C,
            BLOCK_T,
        )
    tl.store(alpha_ptr + sample * EXPERTS + e, alpha, mask=e_inside)

    if rows_ptr is not None:
        for first in range(0, out_channels, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            k_inside = k < out_channels
            inside = e_inside[:, None] & k_inside[None, :]
            biases = tl.load(expert_biases_ptr + e[:, None] * out_channels + k[None, :], mask=inside, other=0.0)
            row = tl.sum(tl.where(inside, biases.to(tl.float32) * alpha[:, None], 0.0), 0)
            if channel_bias_ptr is not None:
                channel_bias_ptrs = channel_bias_ptr + sample * channel_bias_stride + k
                row += tl.load(channel_bias_ptrs, mask=k_inside, other=0.0).to(tl.float32)
            tl.store(rows_ptr + sample * out_channels + k, row, mask=k_inside)


@triton.jit
def _tile_of_experts(experts_ptr, first, i, numel, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    e = first + tl.arange(0, BLOCK_E)
    inside = (e < EXPERTS)[:, None] & (i < numel)[None, :]
    return tl.load(experts_ptr + e.to(tl.int64)[:, None] * numel + i[None, :], mask=inside, other=0.0)


@triton.jit
def mix(
    experts_ptr,  # [E, N]
    alpha_ptr,  # [B, E], float32
    mixed_ptr,  # out: [B, N]
    numel,  # N
    samples,  # B
    blocks,
    samples_per_program,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weights of each sample. A program reads its part of the experts once for all its samples.

    More than ``BLOCK_E`` experts are too many for registers: they are read anew for each sample.
    """
    program = tl.program_id(0)
    i = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first_sample = (program // blocks).to(tl.int64) * samples_per_program
    alpha_ptr += first_sample * EXPERTS
    mixed_ptrs = mixed_ptr + first_sample * numel + i
    if EXPERTS <= BLOCK_E:
        tile = _tile_of_experts(experts_ptr, 0, i, numel, EXPERTS, BLOCK_E)
    for _ in range(tl.minimum(samples_per_program, samples - first_sample)):
        mixture = tl.zeros([BLOCK], tl.float32)
        for first in range(0, EXPERTS, BLOCK_E):
            if EXPERTS > BLOCK_E:
                tile = _tile_of_experts(experts_ptr, first, i, numel, EXPERTS, BLOCK_E)
            e = first + tl.arange(0, BLOCK_E)
            alpha = tl.load(alpha_ptr + e, mask=e < EXPERTS, other=0.0)
            mixture += tl.sum(tile.to(tl.float32) * alpha[:, None], 0)
        tl.store(mixed_ptrs, mixture.to(mixed_ptr.dtype.element_ty), mask=i < numel)
        alpha_ptr += EXPERTS
        mixed_ptrs += numel
