"""The Triton kernel of resnet_block: coefficients of its second norm. All others are conv2d's."""

# Triton gives the arguments their types at the launch
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsd_kernels.conv2d.triton_kernels import store_coefficients
from fastsd_kernels.group_norm_silu.triton_kernels import merge_along, merge_two


@triton.jit
def moment_coefficients(
    moments_ptr,  # mean and m2 [B, tiles, 2, C], from convolve or sum_splits
    weight_ptr,  # [C] or [B, C], or None
    bias_ptr,  # [C] or [B, C], or None
    coefficients_ptr,  # out: center, scale and offset [B, 3, C], float32
    eps,
    channels,
    positions,
    tiles,
    weight_stride,  # elements from one sample to the next; 0 where shared
    bias_stride,
    TILE_POSITIONS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """What the norm of a map does to each channel, out of the map's moments; a program serves a group of a sample."""
    program = tl.program_id(0)
    groups = channels // GROUP_CHANNELS
    sample = (program // groups).to(tl.int64)
    first_channel = program % groups * GROUP_CHANNELS

    # a part is one channel in one tile
    count = 0.0
    mean = 0.0
    m2 = 0.0
    for first_part in range(0, tiles * GROUP_CHANNELS, BLOCK_P):
        part = first_part + tl.arange(0, BLOCK_P)
        tile = (part // GROUP_CHANNELS).to(tl.int64)
        present = tile < tiles
        mean_ptrs = moments_ptr + (sample * tiles + tile) * (2 * channels) + first_channel + part % GROUP_CHANNELS
        part_mean = tl.load(mean_ptrs, mask=present, other=0.0)
        part_m2 = tl.load(mean_ptrs + channels, mask=present, other=0.0)
        part_count = tl.minimum(tl.maximum(positions - tile * TILE_POSITIONS, 0), TILE_POSITIONS).to(tl.float32)
        merged_count, merged_mean, merged_m2 = merge_along(part_count, part_mean, part_m2, axis=0)
        count, mean, m2 = merge_two(count, mean, m2, merged_count, merged_mean, merged_m2)
    rstd = tl.rsqrt(m2 / GROUP_CHANNELS / positions + eps)

    for first in range(0, GROUP_CHANNELS, BLOCK_C):
        of_group = first + tl.arange(0, BLOCK_C)
        store_coefficients(
            tl.full([BLOCK_C], 0.0, tl.float32) + mean,
            tl.full([BLOCK_C], 0.0, tl.float32) + rstd,
            weight_ptr,
            bias_ptr,
            coefficients_ptr,
            sample,
            first_channel + of_group,
            of_group < GROUP_CHANNELS,
            channels,
            weight_stride,
            bias_stride,
        )
