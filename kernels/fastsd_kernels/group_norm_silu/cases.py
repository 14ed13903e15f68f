"""The inputs that group_norm_silu is tried with."""

from collections.abc import Iterator
from typing import Any

import torch

from fastsd_kernels.testing.inputs import BadSample, Sample, feature_map, feature_maps, random_tensor

# Constants of the Triton backend with which these samples take the paths of large inputs:
# several tiles of channels and positions, and parts that are merged in steps
SMALL_TILES = {
    "MOST_CHANNELS_LAST": 4,
    "MOST_CHANNELS_FIRST": 4,
    "FEWEST_LANES": 64,
    "MOST_LANES": 64,
    "FEWEST_POSITIONS_FIRST": 4,
    "MOST_PROGRAMS": 24,
    "MOST_MERGED": 4,
}
# Seconds in small tiles, where wide_group and wide_groups_skip take their paths; as launched they are interpreted by
# tests/ops
NOT_INTERPRETED = ("many_channels", "wide_skip", "far_shifts")


def _parameters(channels: int, batch: int, **like: Any) -> dict[str, Any]:
    return {
        "weight": random_tensor((channels,), **like, seed=1),
        "bias": random_tensor((channels,), **like, seed=2),
        "channel_bias": random_tensor((batch, channels), **like, seed=3),
    }


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Every awkward input of the contract, small enough for an interpreter; dtype is that of the feature maps."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}

    for layout, x in feature_maps((2, 12, 5, 3), **like):
        yield Sample(layout, {"x": x, "num_groups": 4, **_parameters(12, 2, **like)})

    for name, shape, groups in (
        ("vector_width", (2, 32, 8, 8), 8),
        ("off_vector_width", (1, 30, 7, 9), 10),
        ("one_channel_a_group", (1, 6, 4, 4), 6),
        ("one_group", (2, 6, 4, 5), 1),
        ("one_pixel", (3, 8, 1, 1), 4),
        ("one_value_a_group", (2, 8, 1, 1), 8),
        ("many_rows", (1, 8, 37, 41), 2),
        ("wide_group", (1, 144, 3, 2), 1),
        ("many_channels", (1, 640, 3, 2), 32),
        ("empty_batch", (0, 8, 4, 4), 4),
        ("empty_space", (2, 8, 0, 4), 4),
        ("sequence", (2, 8, 11), 4),
        ("no_space", (3, 8), 4),
        ("volume", (1, 8, 3, 2, 5), 4),
    ):
        for layout in ("contiguous", "channels_last"):
            x = feature_map(shape, layout, **like)
            yield Sample(f"{name}_{layout}", {"x": x, "num_groups": groups, **_parameters(shape[1], shape[0], **like)})

    for layout in ("contiguous", "channels_last"):
        x = feature_map((2, 16, 6, 5), layout, **like)
        all_parameters = _parameters(16, 2, **like)
        yield Sample(f"bare_{layout}", {"x": x, "num_groups": 4})
        yield Sample(f"no_activation_{layout}", {"x": x, "num_groups": 4, "activation": "none", **all_parameters})
        yield Sample(f"only_bias_{layout}", {"x": x, "num_groups": 4, "bias": all_parameters["bias"]})
        shared = all_parameters["channel_bias"][:1]
        yield Sample(f"shared_channel_bias_{layout}", {"x": x, "num_groups": 4, "channel_bias": shared})
        mixed = {name: p.to(torch.float32) for name, p in all_parameters.items()} | {
            "weight": all_parameters["weight"].to(torch.bfloat16 if dtype == torch.float32 else torch.float32)
        }
        yield Sample(f"mixed_dtypes_{layout}", {"x": x, "num_groups": 4, **mixed})

        for other in ("contiguous", "channels_last", "sliced_channels"):
            # the third group straddles the seam between x and skip
            skip = feature_map((2, 4, 6, 5), other, **like, seed=4)
            yield Sample(
                f"skip_{layout}_{other}", {"x": x, "num_groups": 5, "skip": skip, **_parameters(20, 2, **like)}
            )
        # groups that are wider than a tile of the Triton backend as SMALL_TILES make it: the second has the seam in it
        seam = {"x": feature_map((2, 12, 6, 5), layout, **like), "num_groups": 2, **_parameters(18, 2, **like)}
        yield Sample(f"wide_groups_skip_{layout}", seam | {"skip": feature_map((2, 6, 6, 5), layout, **like, seed=4)})
        # many channels of few pixels, which the CPU cuts by groups: a piece straddles the seam, the last one is shorter
        wide = {"x": feature_map((1, 850, 3, 2), layout, **like), "num_groups": 9, **_parameters(1152, 1, **like)}
        yield Sample(f"wide_skip_{layout}", wide | {"skip": feature_map((1, 302, 3, 2), layout, **like, seed=4)})
        # a shift of its own for each of many values, all far apart
        short = {"x": feature_map((1, 3120, 1, 1), layout, **like), "num_groups": 24, **_parameters(3120, 1, **like)}
        yield Sample(f"far_shifts_{layout}", short | {"channel_bias": short["channel_bias"] * 10})

        empty = feature_map((2, 0, 6, 5), layout, **like)
        yield Sample(f"empty_skip_{layout}", {"x": x, "num_groups": 4, "skip": empty})
        yield Sample(f"only_skip_{layout}", {"x": empty, "num_groups": 4, "skip": x})

        # a group's mean is far larger than its deviation: E[x²] − mean² has no digits left
        far = x + (2048 if dtype in (torch.float16, torch.bfloat16) else 30000)
        yield Sample(f"large_mean_{layout}", {"x": far, "num_groups": 4, **all_parameters})
        yield Sample(f"large_values_{layout}", {"x": x * 2000, "num_groups": 4, **all_parameters})
        for pixel in (0, 1500):
            spiked = feature_map((1, 8, 64, 64), layout, **like)
            spiked[:, :, pixel // 64, pixel % 64] = 100.0
            yield Sample(f"spike_at_{pixel}_{layout}", {"x": spiked, "num_groups": 4, "activation": "none"})
        yield Sample(f"constant_{layout}", {"x": torch.full_like(x, 3.0), "num_groups": 4, **all_parameters})
        long = feature_map((1, 8, 37, 41), layout, **like)
        # a mean over many elements is rounded, and rstd is large: what the rounding lost must be made up for
        yield Sample(
            f"long_constant_{layout}", {"x": torch.full_like(long, 30000.7), "num_groups": 2, "activation": "none"}
        )
        for name, value in (("nan", torch.nan), ("inf", torch.inf)):
            broken = x.clone()
            broken[1, 3, 2, 2] = value
            yield Sample(f"{name}_{layout}", {"x": broken, "num_groups": 4, **all_parameters})
        spread = feature_map((2, 16, 6, 5), layout, **like)
        yield Sample(f"saturated_{layout}", {"x": spread, "num_groups": 4, "weight": all_parameters["weight"] * 300})


def large_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Sizes where a 16-bit grid dimension or a 32-bit offset would overflow."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    for layout in ("contiguous", "channels_last"):
        x = feature_map((65_537, 4, 2), layout, **like)
        yield Sample(f"batch_65537_{layout}", {"x": x, "num_groups": 2, **_parameters(4, 65_537, **like)})


def bad_samples(device: torch.device | str) -> Iterator[BadSample]:
    """Calls that must be refused, with what the message must name."""
    like: dict[str, Any] = {"device": device, "dtype": torch.float32}
    x = random_tensor((2, 12, 5, 3), **like)

    def bad(name: str, error: type[Exception], says: tuple[str, ...], **changes: Any) -> BadSample:
        return BadSample(name, {"x": x, "num_groups": 4} | changes, error, says)

    yield bad("one_dimension", ValueError, ("x", "(12,)"), x=x[0, :, 0, 0])
    yield bad("integer_x", TypeError, ("x", "floating-point", "int64"), x=x.long())
    yield bad("groups_do_not_divide", ValueError, ("num_groups", "12", "5"), num_groups=5)
    yield bad("no_groups", ValueError, ("num_groups", "0"), num_groups=0)
    yield bad("no_channels", ValueError, ("num_groups", "0 channels"), x=x[:, :0])
    yield bad("weight_shape", ValueError, ("weight", "(12,)", "(11,)"), weight=x.new_ones(11))
    yield bad("bias_shape", ValueError, ("bias", "(12,)", "(1, 12)"), bias=x.new_ones(1, 12))
    yield bad("weight_dtype", TypeError, ("weight", "floating-point"), weight=x.new_ones(12).int())
    yield bad("channel_bias_shape", ValueError, ("channel_bias", "(2, 12)", "(3, 12)"), channel_bias=x.new_ones(3, 12))
    yield bad("channel_bias_rank", ValueError, ("channel_bias", "(12,)"), channel_bias=x.new_ones(12))
    yield bad("skip_size", ValueError, ("skip", "(2, 12, 5, 3)", "(2, 12, 5, 4)"), skip=x.new_ones(2, 12, 5, 4))
    yield bad("skip_rank", ValueError, ("skip",), skip=x.new_ones(2, 12, 15))
    yield bad("skip_dtype", TypeError, ("skip", "float32", "float16"), skip=x.half())
    yield bad("activation", ValueError, ("activation", "silu", "'gelu'"), activation="gelu")
    yield bad("negative_eps", ValueError, ("eps", "-1"), eps=-1.0)
    yield bad("nan_eps", ValueError, ("eps", "nan"), eps=float("nan"))
    yield bad("weight_device", ValueError, ("weight", "meta"), weight=torch.ones(12, device="meta"))
    yield bad("backend_name", ValueError, ("backend", "'numpy'"), backend="numpy")
