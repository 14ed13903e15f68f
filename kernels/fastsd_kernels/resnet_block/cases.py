"""The inputs that resnet_block is tried with."""

from collections.abc import Iterator
from typing import Any

import torch

from fastsd_kernels.conv2d.cases import WINOGRAD_RELATIVE_L2
from fastsd_kernels.testing.inputs import BadSample, Sample, feature_map, feature_maps, random_tensor

# Constants of the Triton backend with which these samples take the paths of large inputs:
# many tiles of positions, the last one ragged, products that are split, moments merged in steps
SMALL_TILES = {
    "conv2d.MOST_M": 16,
    "conv2d.MOST_N": 16,
    "conv2d.MOST_K": 16,
    "conv2d.FEWEST_PROGRAMS": 24,
    "conv2d.FEWEST_STEPS": 6,
    "conv2d.SUM_M": 8,
    "conv2d.SUM_N": 4,
    "MOST_MERGED": 4,
    "MOST_CHANNELS": 2,
    "group_norm_silu.MOST_CHANNELS_LAST": 2,
    "group_norm_silu.FEWEST_LANES": 64,
    "group_norm_silu.MOST_LANES": 64,
    "group_norm_silu.MOST_PROGRAMS": 24,
}

# Beginnings of names of samples that take the interpreter minutes. These are as large for the CPU, which has Winograd's
# algorithms for such a map; in small tiles others take all paths of the Triton backend
NOT_INTERPRETED = ("winograd",)


def block(channels: int, out_channels: int, num_groups: int, **like: Any) -> dict[str, Any]:
    """The parameters of a block, without time embedding; a shortcut where the numbers of channels differ."""

    def vector(size: int, seed: int) -> torch.Tensor:
        return random_tensor((size,), **like, seed=seed)

    def weight(of: int, kernel: int, seed: int) -> torch.Tensor:
        return random_tensor((out_channels, of, kernel, kernel), **like, seed=seed) * (of * kernel * kernel) ** -0.5

    parameters = {
        "conv1_weight": weight(channels, 3, 1),
        "conv2_weight": weight(out_channels, 3, 2),
        "conv1_bias": vector(out_channels, 3),
        "conv2_bias": vector(out_channels, 4),
        "num_groups": num_groups,
        "norm1_weight": vector(channels, 5),
        "norm1_bias": vector(channels, 6),
        "norm2_weight": vector(out_channels, 7),
        "norm2_bias": vector(out_channels, 8),
    }
    if channels != out_channels:
        parameters |= {"shortcut_weight": weight(channels, 1, 9), "shortcut_bias": vector(out_channels, 10)}
    return parameters


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Every awkward input of the contract, small enough for an interpreter; dtype is that of the feature maps."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}

    for layout, x in feature_maps((2, 8, 5, 3), **like):
        yield Sample(f"identity_{layout}", {"x": x} | block(8, 8, 4, **like))
        embedded = {"channel_bias": random_tensor((2, 16), **like, seed=11), "output_scale": 0.75}
        yield Sample(f"everything_{layout}", {"x": x} | block(8, 16, 4, **like) | embedded)

    for name, shape, out_channels, groups in (
        ("vector_width", (1, 32, 4, 8), 32, 4),
        ("off_vector_width", (1, 30, 5, 7), 14, 2),
        ("one_channel_a_group", (1, 8, 6, 5), 16, 8),
        ("one_group", (2, 6, 4, 5), 10, 1),
        ("one_pixel", (3, 8, 1, 1), 8, 4),
        ("one_row", (1, 8, 1, 19), 16, 4),
        ("many_tiles", (1, 16, 13, 13), 16, 4),
        ("empty_batch", (0, 8, 4, 4), 16, 4),
    ):
        for layout in ("contiguous", "channels_last"):
            x = feature_map(shape, layout, **like)
            yield Sample(f"{name}_{layout}", {"x": x} | block(shape[1], out_channels, groups, **like))

    for layout in ("contiguous", "channels_last"):
        x = feature_map((2, 16, 6, 5), layout, **like)
        given = {"x": x} | block(16, 8, 4, **like)
        yield Sample(f"groups_out_{layout}", given | {"num_groups_out": 2})
        yield Sample(f"shared_channel_bias_{layout}", given | {"channel_bias": random_tensor((1, 8), **like)})
        scale_shift = {name: random_tensor((2, 8), **like, seed=12) for name in ("norm2_weight", "norm2_bias")}
        yield Sample(f"scale_shift_{layout}", given | scale_shift)
        affine = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "conv1_bias", "conv2_bias")
        yield Sample(f"bare_{layout}", given | dict.fromkeys((*affine, "shortcut_bias")))
        other = torch.float32 if dtype != torch.float32 else torch.float64
        mixed = {name: given[name].to(other) for name in affine}
        yield Sample(f"mixed_dtypes_{layout}", given | mixed)
        # the second norm's input lies far from zero
        far = {"channel_bias": x.new_full((2, 8), 256.0 if dtype in (torch.float16, torch.bfloat16) else 30000.0)}
        yield Sample(f"large_mean_{layout}", given | far)
        for skip_layout in ("contiguous", "channels_last", "sliced_channels"):
            skip = feature_map((2, 4, 6, 5), skip_layout, **like, seed=13)
            # the third group straddles the seam between x and skip
            yield Sample(f"skip_{layout}_{skip_layout}", {"x": x, "skip": skip} | block(20, 10, 5, **like))
        yield Sample(f"skip_identity_{layout}", {"x": x, "skip": skip} | block(20, 20, 5, **like))
        for name, value in (("nan", torch.nan), ("inf", torch.inf)):
            broken = x.clone()
            broken[1, 3, 2, 2] = value
            yield Sample(f"{name}_{layout}", given | {"x": broken})

        shortcut = {name: given[name] for name in ("shortcut_weight", "shortcut_bias")}
        pruned = {"x": x, "conv1_weight": None, "conv2_weight": None}
        yield Sample(f"pruned_{layout}", pruned | shortcut | {"output_scale": 0.5})
        yield Sample(
            f"pruned_skip_{layout}", pruned | {"skip": skip, "shortcut_weight": random_tensor((8, 20, 1, 1), **like)}
        )
        yield Sample(f"pruned_identity_{layout}", pruned)
        yield Sample(f"pruned_identity_skip_{layout}", pruned | {"skip": skip, "output_scale": 2.0})

    bound = WINOGRAD_RELATIVE_L2 if dtype == torch.float32 else None
    for layout in ("contiguous", "channels_last"):
        x, skip = (feature_map((1, 64, 16, 18), layout, **like, seed=seed) for seed in (0, 14))
        embedded = {"channel_bias": random_tensor((1, 64), **like, seed=11)}
        yield Sample(f"winograd_{layout}", {"x": x, "skip": skip} | block(128, 64, 32, **like) | embedded, bound)


def large_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Sizes where a 16-bit grid dimension would overflow."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    for layout in ("contiguous", "channels_last"):
        yield Sample(
            f"batch_65537_{layout}", {"x": feature_map((65_537, 4, 2, 2), layout, **like)} | block(4, 4, 2, **like)
        )


def bad_samples(device: torch.device | str) -> Iterator[BadSample]:
    """Calls that must be refused, with what the message must name."""
    like: dict[str, Any] = {"device": device, "dtype": torch.float32}
    x = random_tensor((2, 12, 5, 3), **like)
    good = {"x": x} | block(12, 8, 4, **like)
    weight = good["conv1_weight"]

    def bad(name: str, error: type[Exception], says: tuple[str, ...], **changes: Any) -> BadSample:
        return BadSample(name, good | changes, error, says)

    yield bad("three_dimensions", ValueError, ("x", "(2, 12, 5)"), x=x[..., 0])
    yield bad("integer_x", TypeError, ("x: ", "floating-point", "int64"), x=x.long())
    yield bad("empty_map", ValueError, ("x", "(2, 12, 0, 3)"), x=x[:, :, :0])
    yield bad("skip_size", ValueError, ("skip", "(2, 12, 5, 3)", "(2, 4, 5, 4)"), skip=x.new_ones(2, 4, 5, 4))
    yield bad("skip_dtype", TypeError, ("skip", "float32", "float16"), skip=x.new_ones(2, 0, 5, 3).half())
    yield bad("one_convolution", ValueError, ("conv1_weight", "conv2_weight", "both"), conv2_weight=None)
    yield bad(
        "weight_dtype", TypeError, ("conv1_weight", "float32", "float16"), conv1_weight=good["conv1_weight"].half()
    )
    yield bad("weight_rank", ValueError, ("conv1_weight", "(8, 12)"), conv1_weight=weight[..., 0, 0])
    yield bad(
        "weight_channels",
        ValueError,
        ("conv1_weight", "(8, 12, 3, 3)", "(8, 11, 3, 3)"),
        conv1_weight=x.new_ones(8, 11, 3, 3),
    )
    yield bad("second_weight", ValueError, ("conv2_weight", "(8, 8, 3, 3)"), conv2_weight=x.new_ones(8, 12, 3, 3))
    yield bad(
        "shortcut_is_3x3",
        ValueError,
        ("shortcut_weight", "(at least 1, 12, 1, 1)", "(8, 12, 3, 3)"),
        shortcut_weight=x.new_ones(8, 12, 3, 3),
    )
    yield bad(
        "identity_of_other_width",
        ValueError,
        ("conv1_weight", "(12, 12, 3, 3)", "(8, 12, 3, 3)"),
        shortcut_weight=None,
        shortcut_bias=None,
    )
    yield bad("bias_of_no_shortcut", ValueError, ("shortcut_bias", "shortcut_weight"), shortcut_weight=None)
    yield bad("pruned_with_norm", ValueError, ("conv1_bias", "convolutions"), conv1_weight=None, conv2_weight=None)
    yield bad("groups_do_not_divide", ValueError, ("num_groups", "12", "5"), num_groups=5)
    yield bad("no_groups", ValueError, ("num_groups", "12", "0"), num_groups=0)
    yield bad("groups_do_not_divide_out", ValueError, ("num_groups", "8", "3"), num_groups=3)
    yield bad("groups_out", ValueError, ("num_groups_out", "8", "5"), num_groups_out=5)
    yield bad("norm1_by_sample", ValueError, ("norm1_weight", "(12,)", "(2, 12)"), norm1_weight=x.new_ones(2, 12))
    yield bad("norm2_shape", ValueError, ("norm2_bias", "(2, 8)", "(3, 8)"), norm2_bias=x.new_ones(3, 8))
    yield bad("channel_bias_shape", ValueError, ("channel_bias", "(2, 8)", "(3, 8)"), channel_bias=x.new_ones(3, 8))
    yield bad("bias_shape", ValueError, ("conv2_bias", "(8,)", "(12,)"), conv2_bias=x.new_ones(12))
    yield bad("bias_dtype", TypeError, ("conv1_bias", "floating-point"), conv1_bias=x.new_ones(8).int())
    yield bad("negative_eps", ValueError, ("eps", "-1"), eps=-1.0)
    yield bad("nan_eps", ValueError, ("eps", "nan"), eps=float("nan"))
    yield bad("device", ValueError, ("conv1_weight", "meta"), conv1_weight=weight.to("meta"))
    yield bad("backend_name", ValueError, ("backend", "'numpy'"), backend="numpy")
