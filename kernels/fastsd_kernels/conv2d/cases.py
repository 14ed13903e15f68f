"""The inputs that conv2d is tried with."""

from collections.abc import Iterator
from typing import Any

import torch

from fastsd_kernels.testing.inputs import BadSample, Sample, feature_map, feature_maps, random_tensor

# Constants of the Triton backend with which these samples take the paths of large inputs:
# several tiles of either kind, splits that begin or end at the seam of x and skip, and statistics in several parts
SMALL_TILES = {
    "MOST_M": 16,
    "MOST_N": 16,
    "MOST_K": 16,
    "FEWEST_PROGRAMS": 24,
    "FEWEST_STEPS": 4,
    "SUM_M": 8,
    "SUM_N": 4,
    "group_norm_silu.MOST_CHANNELS_LAST": 4,
    "group_norm_silu.FEWEST_LANES": 64,
    "group_norm_silu.MOST_LANES": 64,
    "group_norm_silu.MOST_PROGRAMS": 24,
}

# Winograd's sums of products are not those of the definition: the contract gives it a bound of its own
WINOGRAD_RELATIVE_L2 = 3e-5

_SAME = {"padding": 1}


def _weight(out_channels: int, channels: int, kernel: int, **like: Any) -> torch.Tensor:
    scale = (channels * kernel * kernel) ** -0.5
    return random_tensor((out_channels, channels, kernel, kernel), **like, seed=5) * scale


def _norm(channels: int, num_groups: int, **like: Any) -> dict[str, Any]:
    return {
        "num_groups": num_groups,
        "norm_weight": random_tensor((channels,), **like, seed=1),
        "norm_bias": random_tensor((channels,), **like, seed=2),
        "activation": "silu",
    }


def _epilogue(batch: int, channels: int, size: tuple[int, int], layout: str, **like: Any) -> dict[str, Any]:
    return {
        "bias": random_tensor((channels,), **like, seed=6),
        "channel_bias": random_tensor((batch, channels), **like, seed=7),
        "residual": feature_map((batch, channels, *size), layout, **like, seed=8),
        "output_scale": 0.75,
    }


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Every awkward input of the contract, small enough for an interpreter; dtype is that of the feature maps."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}

    for layout, x in feature_maps((2, 12, 5, 3), **like):
        weight = _weight(8, 12, 3, **like)
        yield Sample(f"plain_{layout}", {"x": x, "weight": weight, **_SAME})
        everything = _norm(12, 4, **like) | _epilogue(2, 8, (5, 3), layout, **like)
        yield Sample(f"everything_{layout}", {"x": x, "weight": weight, **_SAME, **everything})

    for name, shape, out_channels, kernel, changes in (
        ("vector_width", (2, 32, 8, 8), 32, 3, _SAME),
        ("off_vector_width", (1, 30, 7, 9), 14, 3, _SAME),
        ("conv_in", (2, 4, 9, 8), 16, 3, _SAME),
        ("conv_out", (2, 16, 8, 9), 4, 3, _SAME),
        ("one_channel", (1, 1, 6, 6), 1, 3, _SAME),
        ("one_pixel", (3, 8, 1, 1), 8, 3, _SAME),
        ("one_row", (1, 8, 1, 19), 8, 3, _SAME),
        ("many_tiles", (1, 16, 37, 21), 16, 3, _SAME),
        ("no_padding", (1, 8, 6, 7), 8, 3, {}),
        ("wide_padding", (1, 8, 4, 5), 8, 3, {"padding": 2}),
        ("stride_2", (2, 8, 9, 8), 16, 3, {"stride": 2, "padding": 1}),
        ("stride_2_right_bottom", (2, 8, 8, 9), 16, 3, {"stride": 2, "padding": (0, 1, 0, 1)}),
        ("uneven_padding", (1, 8, 5, 6), 8, 3, {"padding": (2, 0, 1, 3)}),
        ("pointwise", (2, 32, 8, 8), 16, 1, {}),
        ("pointwise_off_vector_width", (1, 30, 7, 5), 14, 1, {}),
        ("pointwise_padded", (1, 8, 3, 4), 8, 1, {"padding": 1}),
        ("pointwise_stride_2", (1, 8, 5, 6), 8, 1, {"stride": 2}),
        ("upsampled", (2, 8, 4, 5), 16, 3, {"padding": 1, "upsample_size": (8, 10)}),
        ("upsampled_odd", (2, 8, 4, 5), 16, 3, {"padding": 1, "upsample_size": (7, 9)}),
        ("upsampled_threefold", (1, 8, 3, 2), 8, 3, {"padding": 1, "upsample_size": (9, 5)}),
        ("empty_batch", (0, 8, 4, 4), 8, 3, _SAME),
    ):
        for layout in ("contiguous", "channels_last"):
            x, weight = feature_map(shape, layout, **like), _weight(out_channels, shape[1], kernel, **like)
            given: dict[str, Any] = {"x": x, "weight": weight, **changes}
            yield Sample(f"{name}_{layout}", given | {"bias": random_tensor((out_channels,), **like)})

    for layout in ("contiguous", "channels_last"):
        x, weight = feature_map((2, 16, 6, 5), layout, **like), _weight(8, 16, 3, **like)
        given = {"x": x, "weight": weight, **_SAME}
        norm = _norm(16, 4, **like)
        yield Sample(f"silu_{layout}", given | {"activation": "silu"})
        yield Sample(f"bare_norm_{layout}", given | {"num_groups": 4})
        yield Sample(f"norm_without_activation_{layout}", given | norm | {"activation": "none"})
        by_sample = {name: random_tensor((2, 16), **like, seed=9) for name in ("norm_weight", "norm_bias")}
        yield Sample(f"norm_by_sample_{layout}", given | norm | by_sample)
        statistics = {name: random_tensor((2, 4), **like, seed=3).abs() for name in ("mean", "rstd")}
        yield Sample(f"statistics_{layout}", given | norm | statistics)
        far = x + (2048 if dtype in (torch.float16, torch.bfloat16) else 30000)
        yield Sample(f"large_mean_{layout}", given | norm | {"x": far})
        yield Sample(f"shared_channel_bias_{layout}", given | {"channel_bias": random_tensor((1, 8), **like)})
        other = torch.float32 if dtype != torch.float32 else torch.float64
        mixed = {name: p.to(other) if isinstance(p, torch.Tensor) else p for name, p in norm.items()}
        yield Sample(f"mixed_dtypes_{layout}", given | mixed | {"bias": random_tensor((8,), device, other)})
        weight_last = weight.contiguous(memory_format=torch.channels_last)
        yield Sample(f"weight_channels_last_{layout}", given | norm | {"weight": weight_last})
        for skip_layout in ("contiguous", "channels_last", "sliced_channels"):
            skip = feature_map((2, 4, 6, 5), skip_layout, **like, seed=4)
            # the third group straddles the seam between x and skip
            both = {"x": x, "skip": skip, "weight": _weight(8, 20, 3, **like), **_SAME, **_norm(20, 5, **like)}
            yield Sample(f"skip_{layout}_{skip_layout}", both)
        yield Sample(f"skip_without_norm_{layout}", both | {"num_groups": 0, "norm_weight": None, "norm_bias": None})
        pointwise = both | {"weight": _weight(8, 20, 1, **like), "padding": 0}
        yield Sample(f"pointwise_everything_{layout}", pointwise | _epilogue(2, 8, (6, 5), layout, **like))
        enlarged = both | {"upsample_size": (11, 10)} | _epilogue(2, 8, (11, 10), layout, **like)
        yield Sample(f"upsampled_everything_{layout}", enlarged)
        other_layout = "channels_last" if layout == "contiguous" else "contiguous"
        yield Sample(f"residual_in_other_layout_{layout}", given | _epilogue(2, 8, (6, 5), other_layout, **like))
        strided = _epilogue(2, 8, (3, 3), "sliced_channels", **like)
        yield Sample(f"stride_2_everything_{layout}", given | norm | strided | {"stride": 2})
        for name, value in (("nan", torch.nan), ("inf", torch.inf)):
            broken = feature_map((2, 16, 6, 5), layout, **like).clone()
            broken[1, 3, 2, 2] = value
            yield Sample(f"{name}_{layout}", given | norm | {"x": broken})

    for algorithm in ("direct", "product", "winograd2", "winograd4"):
        bound = WINOGRAD_RELATIVE_L2 if algorithm.startswith("winograd") and dtype == torch.float32 else None
        for layout in ("contiguous", "channels_last"):
            for height, width in ((8, 8), (6, 5), (1, 13), (9, 22)):
                x, skip = (feature_map((2, 16, height, width), layout, **like, seed=seed) for seed in (0, 4))
                given = {"x": x, "weight": _weight(24, 16, 3, **like), **_SAME, "algorithm": algorithm}
                name = f"{algorithm}_{height}x{width}_{layout}"
                yield Sample(name, given | _norm(16, 4, **like), bound)
                given |= {"skip": skip, "weight": _weight(24, 32, 3, **like), "padding": (1, 2, 0, 1)}
                everything = _norm(32, 4, **like) | _epilogue(2, 24, (height - 1, width + 1), layout, **like)
                if height > 1:
                    yield Sample(f"{name}_everything", given | everything, bound)

    for layout in ("contiguous", "channels_last"):
        x, skip = (feature_map((2, 16, 9, 22), layout, **like, seed=seed) for seed in (0, 4))
        for name, kernel, stride, padding, size in (
            ("pointwise", 1, 1, 0, (9, 22)),
            ("stride_2", 3, 2, (0, 1, 0, 1), (4, 11)),
            ("pointwise_stride_2", 1, 2, 0, (5, 11)),
        ):
            given = {"x": x, "skip": skip, "weight": _weight(24, 32, kernel, **like), "algorithm": "product"}
            given |= {"stride": stride, "padding": padding} | _norm(32, 4, **like)
            yield Sample(f"product_{name}_{layout}", given | _epilogue(2, 24, size, layout, **like))


def large_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Sizes where a 16-bit grid dimension would overflow."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    for layout in ("contiguous", "channels_last"):
        x = feature_map((65_537, 4, 2, 2), layout, **like)
        yield Sample(f"batch_65537_{layout}", {"x": x, "weight": _weight(4, 4, 3, **like), **_SAME, "num_groups": 2})


def bad_samples(device: torch.device | str) -> Iterator[BadSample]:
    """Calls that must be refused, with what the message must name."""
    like: dict[str, Any] = {"device": device, "dtype": torch.float32}
    x, weight = random_tensor((2, 12, 5, 3), **like), random_tensor((8, 12, 3, 3), **like)

    def bad(name: str, error: type[Exception], says: tuple[str, ...], **changes: Any) -> BadSample:
        return BadSample(name, {"x": x, "weight": weight, **_SAME} | changes, error, says)

    yield bad("three_dimensions", ValueError, ("x", "(2, 12, 5)"), x=x[..., 0])
    yield bad("integer_x", TypeError, ("floating-point", "int64"), x=x.long(), weight=weight.long())
    yield bad("weight_dtype", TypeError, ("weight", "float32", "float16"), weight=weight.half())
    yield bad("weight_rank", ValueError, ("weight", "(8, 12)"), weight=weight[..., 0, 0])
    yield bad("weight_channels", ValueError, ("weight", "12", "(8, 11, 3, 3)"), weight=weight[:, :11])
    yield bad("weight_size", ValueError, ("weight", "(8, 12, 2, 2)"), weight=weight[..., :2, :2])
    yield bad("weight_oblong", ValueError, ("weight", "(8, 12, 3, 1)"), weight=weight[..., :1])
    yield bad("no_channels", ValueError, ("weight", "at least one"), x=x[:, :0], weight=weight[:, :0])
    yield bad("no_out_channels", ValueError, ("weight", "at least one"), weight=weight[:0])
    yield bad("stride", ValueError, ("stride", "3"), stride=3)
    yield bad("negative_padding", ValueError, ("padding", "-1"), padding=-1)
    yield bad("padding_length", ValueError, ("padding", "(left, right, top, bottom)"), padding=(1, 1))
    yield bad("too_small", ValueError, ("x", "(2, 12, 5, 1)"), x=x[..., :1], padding=0)
    yield bad("empty_map", ValueError, ("x", "(2, 12, 0, 3)"), x=x[:, :, :0])
    yield bad("upsample_size", ValueError, ("upsample_size", "(10,)"), upsample_size=(10,))
    yield bad("upsample_to_nothing", ValueError, ("upsample_size", "(0, 6)"), upsample_size=(0, 6))
    yield bad("groups_do_not_divide", ValueError, ("num_groups", "12", "5"), num_groups=5)
    yield bad("negative_groups", ValueError, ("num_groups", "-1"), num_groups=-1)
    yield bad("norm_without_groups", ValueError, ("norm_weight", "num_groups"), norm_weight=x.new_ones(12))
    yield bad("norm_weight_shape", ValueError, ("norm_weight", "11"), num_groups=4, norm_weight=x.new_ones(11))
    yield bad("norm_bias_shape", ValueError, ("norm_bias", "(1, 12)"), num_groups=4, norm_bias=x.new_ones(1, 12))
    yield bad("mean_alone", ValueError, ("mean", "rstd"), num_groups=4, mean=x.new_ones(2, 4))
    statistics = {"mean": x.new_ones(2, 3), "rstd": x.new_ones(2, 3)}
    yield bad("mean_shape", ValueError, ("mean", "(2, 4)", "(2, 3)"), num_groups=4, **statistics)
    yield bad("negative_eps", ValueError, ("eps", "-1"), num_groups=4, eps=-1.0)
    yield bad("nan_eps", ValueError, ("eps", "nan"), num_groups=4, eps=float("nan"))
    yield bad("activation", ValueError, ("activation", "silu", "'gelu'"), activation="gelu")
    yield bad("algorithm", ValueError, ("algorithm", "direct", "'fft'"), algorithm="fft")
    yield bad("bias_shape", ValueError, ("bias", "(8,)", "(12,)"), bias=x.new_ones(12))
    yield bad("bias_dtype", TypeError, ("bias", "floating-point"), bias=x.new_ones(8).int())
    yield bad("channel_bias_shape", ValueError, ("channel_bias", "(2, 8)", "(3, 8)"), channel_bias=x.new_ones(3, 8))
    yield bad("residual_shape", ValueError, ("residual", "(2, 8, 5, 3)"), residual=x)
    half = x.new_ones(2, 8, 5, 3).half()
    yield bad("residual_dtype", TypeError, ("residual", "float32", "float16"), residual=half)
    yield bad("skip_size", ValueError, ("skip", "(2, 12, 5, 3)", "(2, 12, 5, 4)"), skip=x.new_ones(2, 12, 5, 4))
    yield bad("weight_device", ValueError, ("weight", "meta"), weight=weight.to("meta"))
    yield bad("backend_name", ValueError, ("backend", "'numpy'"), backend="numpy")
