"""The two Triton kernels of group_norm_silu: statistics of pieces of a group, then normalise and activate.

Both launches cut the maps in the same way (see ``triton_impl.plan``). A program serves one sample, one split of
the positions and one channel tile, and walks over its split in tiles of ``[BLOCK_C, BLOCK_S]``. A channel tile is
``GROUPS_PER_TILE`` whole groups, or one of the ``TILES_PER_GROUP`` parts of one wide group.

A part of a group, (split, tile within the group), is described by its count, its mean and the sum of squared
deviations from that mean, m2. Parts are merged by the formula of Chan, Golub and LeVeque in a fixed order, so
nothing cancels for a large mean and two runs are bitwise equal.
"""

# Triton gives the arguments their types at the launch
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def merge_two(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    count = count_a + count_b
    share_b = count_b / tl.maximum(count, 1.0)
    delta = mean_b - mean_a
    return count, mean_a + delta * share_b, m2_a + m2_b + delta * delta * (count_a * share_b)


@triton.jit
def merge_along(count, mean, m2, axis: tl.constexpr):
    """Merge all parts along ``axis``; where the count is 0, the mean and m2 must be 0."""
    total = tl.sum(count, axis)
    reciprocal = 1.0 / tl.maximum(total, 1.0)
    merged_mean = tl.sum(count * mean, axis) * reciprocal
    deviation = tl.where(count > 0, mean - tl.expand_dims(merged_mean, axis), 0.0)
    # the first mean is rounded; the deviations from it say by how much
    correction = tl.sum(count * deviation, axis) * reciprocal
    return total, merged_mean + correction, tl.sum(m2 + count * deviation * deviation, axis)


@triton.jit
def moments(x, inside, count, axis: tl.constexpr):
    """Mean and m2 along ``axis`` of ``x``, 0 outside, with ``count`` elements inside."""
    reciprocal = 1.0 / tl.maximum(count, 1.0)
    mean = tl.sum(x, axis) * reciprocal
    deviation = tl.where(inside, x - tl.expand_dims(mean, axis), 0.0)
    correction = tl.sum(deviation, axis) * reciprocal
    return mean + correction, tl.sum(deviation * deviation, axis) - count * correction * correction


@triton.jit
def _offsets(sample, c, s, channels, space, CHANNELS_LAST: tl.constexpr):
    # 64 bits: a map may hold more than 2³¹ elements
    if CHANNELS_LAST:
        return (sample.to(tl.int64) * space + s)[None, :] * channels + c[:, None]
    else:
        return (sample.to(tl.int64) * channels + c)[:, None] * space + s[None, :]


@triton.jit
def _load(x_ptr, skip_ptr, sample, c, s, inside, x_channels, channels, space, CHANNELS_LAST: tl.constexpr):
    """A tile of cat(x, skip) as ``[len(c), len(s)]``, in the maps' dtype; 0 outside."""
    in_x = inside & (c < x_channels)[:, None]
    tile = tl.load(x_ptr + _offsets(sample, c, s, x_channels, space, CHANNELS_LAST), mask=in_x, other=0.0)
    if skip_ptr is not None:
        in_skip = inside & (c >= x_channels)[:, None]
        offsets = _offsets(sample, c - x_channels, s, channels - x_channels, space, CHANNELS_LAST)
        tile = tl.load(skip_ptr + offsets, mask=in_skip, other=tile)
    return tile


@triton.jit
def _program(splits, channel_tiles):
    """This program's sample, split and channel tile. One grid axis: the other two end at 65 535."""
    program = tl.program_id(0)
    return (
        program // channel_tiles // splits,
        program // channel_tiles % splits,
        program % channel_tiles,
    )


@triton.jit
def channel_tile(
    tile,
    channels,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS_PER_TILE: tl.constexpr,
    TILES_PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The first group of a channel tile, its channels, and which of them count."""
    if TILES_PER_GROUP == 1:
        first_group = tile * GROUPS_PER_TILE
        c = tile * (GROUPS_PER_TILE * GROUP_CHANNELS) + tl.arange(0, BLOCK_C)
    else:
        first_group = tile // TILES_PER_GROUP
        c = first_group * GROUP_CHANNELS + tile % TILES_PER_GROUP * BLOCK_C + tl.arange(0, BLOCK_C)
    end = tl.minimum((first_group + GROUPS_PER_TILE) * GROUP_CHANNELS, channels)
    return first_group, c, c < end


@triton.jit
def group_statistics(
    x_ptr,  # [B, C1, S]
    skip_ptr,  # [B, C2, S] or None
    channel_bias_ptr,  # [B, C] or [1, C], or None
    parts_ptr,  # out: mean and m2 [B, splits * TILES_PER_GROUP, 2, G], float32
    x_channels,
    channels,
    space,
    channel_bias_stride,  # elements from one sample to the next; 0 where shared
    channel_tiles,
    splits,
    tiles_per_split,
    CHANNELS_LAST: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS_PER_TILE: tl.constexpr,
    TILES_PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    sample, split, tile = _program(splits, channel_tiles)
    first_group, c, c_inside = channel_tile(tile, channels, GROUP_CHANNELS, GROUPS_PER_TILE, TILES_PER_GROUP, BLOCK_C)

    first = split.to(tl.int64) * tiles_per_split * BLOCK_S
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for step in range(tiles_per_split):
        start = first + step * BLOCK_S
        s = start + tl.arange(0, BLOCK_S)
        inside = c_inside[:, None] & (s < space)[None, :]
        x = _load(x_ptr, skip_ptr, sample, c, s, inside, x_channels, channels, space, CHANNELS_LAST)
        tile_count = tl.minimum(tl.maximum(space - start, 0), BLOCK_S).to(tl.float32)
        tile_mean, tile_m2 = moments(x.to(tl.float32), inside, tile_count, axis=1)
        count, mean, m2 = merge_two(count, mean, m2, tile_count, tile_mean, tile_m2)

    if channel_bias_ptr is not None:
        bias_ptrs = channel_bias_ptr + sample.to(tl.int64) * channel_bias_stride + c
        mean += tl.load(bias_ptrs, mask=c_inside, other=0.0).to(tl.float32)

    group = tl.arange(0, BLOCK_G)
    member = c_inside[:, None] & ((c // GROUP_CHANNELS - first_group)[:, None] == group[None, :])
    _, group_mean, group_m2 = merge_along(
        tl.where(member, count, 0.0),
        tl.where(member, mean[:, None], 0.0),
        tl.where(member, m2[:, None], 0.0),
        axis=0,
    )

    groups = channels // GROUP_CHANNELS
    if TILES_PER_GROUP == 1:
        part = sample.to(tl.int64) * splits + split
    else:
        part = (sample.to(tl.int64) * splits + split) * TILES_PER_GROUP + tile % TILES_PER_GROUP
    mean_ptrs = parts_ptr + part * (2 * groups) + first_group + group
    stored = (group < GROUPS_PER_TILE) & (first_group + group < groups)
    tl.store(mean_ptrs, group_mean, mask=stored)
    tl.store(mean_ptrs + groups, group_m2, mask=stored)


@triton.jit
def _merged_parts(
    parts_ptr,
    sample,
    first_group,
    groups,
    space,
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
    """Mean and m2 ``[BLOCK_G]`` of the groups from ``first_group`` on, over all their parts."""
    group = tl.arange(0, BLOCK_G)
    wanted = (group < GROUPS_PER_TILE) & (first_group + group < groups)
    parts = splits * TILES_PER_GROUP

    count = tl.zeros([BLOCK_G], tl.float32)
    mean = tl.zeros([BLOCK_G], tl.float32)
    m2 = tl.zeros([BLOCK_G], tl.float32)
    for first_part in range(0, parts, BLOCK_P):
        part = first_part + tl.arange(0, BLOCK_P)
        present = (part < parts)[:, None] & wanted[None, :]
        row = (sample.to(tl.int64) * parts + part) * (2 * groups)
        mean_ptrs = parts_ptr + row[:, None] + (first_group + group)[None, :]
        part_mean = tl.load(mean_ptrs, mask=present, other=0.0)
        part_m2 = tl.load(mean_ptrs + groups, mask=present, other=0.0)
        part_split = (part // TILES_PER_GROUP).to(tl.int64)
        start = part_split * tiles_per_split * BLOCK_S
        end = tl.minimum((part_split + 1) * tiles_per_split * BLOCK_S, space)
        part_channels = tl.minimum(GROUP_CHANNELS - part % TILES_PER_GROUP * BLOCK_C, BLOCK_C)
        part_count = tl.where(present, ((end - start) * part_channels).to(tl.float32)[:, None], 0.0)
        merged_count, merged_mean, merged_m2 = merge_along(part_count, part_mean, part_m2, axis=0)
        count, mean, m2 = merge_two(count, mean, m2, merged_count, merged_mean, merged_m2)
    return mean, m2


@triton.jit
def channel_statistics(
    parts_ptr,
    eps,
    sample,
    first_group,
    c,
    channels,
    space,
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
    """Mean and 1/sqrt(variance + eps) of the group of each of the channels ``c`` of a tile, ``[BLOCK_C]``."""
    mean, m2 = _merged_parts(
        parts_ptr,
        sample,
        first_group,
        channels // GROUP_CHANNELS,
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
    variance = m2 / GROUP_CHANNELS / space
    rstd = tl.rsqrt(variance + eps)

    # channels side by side: each thread sums over the groups of its own
    member = (c // GROUP_CHANNELS - first_group)[None, :] == tl.arange(0, BLOCK_G)[:, None]
    return tl.sum(tl.where(member, mean[:, None], 0.0), 0), tl.sum(tl.where(member, rstd[:, None], 0.0), 0)


@triton.jit
def normalise_activate(
    x_ptr,  # [B, C1, S]
    skip_ptr,  # [B, C2, S] or None
    channel_bias_ptr,  # [B, C] or [1, C], or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    parts_ptr,  # [B, splits * TILES_PER_GROUP, 2, G], from group_statistics
    y_ptr,  # out: [B, C, S]
    eps,
    x_channels,
    channels,
    space,
    channel_bias_stride,
    channel_tiles,
    splits,
    tiles_per_split,
    CHANNELS_LAST: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS_PER_TILE: tl.constexpr,
    TILES_PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SILU: tl.constexpr,
):
    sample, split, tile = _program(splits, channel_tiles)
    first_group, c, c_inside = channel_tile(tile, channels, GROUP_CHANNELS, GROUPS_PER_TILE, TILES_PER_GROUP, BLOCK_C)

    # asked for before the statistics are merged, so that the two wait for memory together
    s = split.to(tl.int64) * tiles_per_split * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = c_inside[:, None] & (s < space)[None, :]
    x = _load(x_ptr, skip_ptr, sample, c, s, inside, x_channels, channels, space, CHANNELS_LAST)

    channel_mean, scale = channel_statistics(
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
    offset = tl.zeros([BLOCK_C], tl.float32)
    if channel_bias_ptr is not None:
        bias_ptrs = channel_bias_ptr + sample.to(tl.int64) * channel_bias_stride + c
        added = tl.load(bias_ptrs, mask=c_inside, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        offset += tl.load(bias_ptr + c, mask=c_inside, other=0.0).to(tl.float32)

    for step in range(tiles_per_split):
        z = x.to(tl.float32)
        if channel_bias_ptr is not None:
            z += added[:, None]
        u = (z - channel_mean[:, None]) * scale[:, None] + offset[:, None]
        y = u / (1.0 + tl.exp(-u)) if SILU else u
        y_ptrs = y_ptr + _offsets(sample, c, s, channels, space, CHANNELS_LAST)
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)

        s += BLOCK_S
        inside = c_inside[:, None] & (s < space)[None, :] & (step + 1 < tiles_per_split)
        x = _load(x_ptr, skip_ptr, sample, c, s, inside, x_channels, channels, space, CHANNELS_LAST)
