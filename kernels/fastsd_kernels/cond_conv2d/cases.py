"""The inputs that cond_conv2d is tried with."""

from collections.abc import Iterator
from typing import Any

import torch

from fastsd_kernels.cond_conv2d import STRATEGIES
from fastsd_kernels.conv2d.cases import WINOGRAD_RELATIVE_L2
from fastsd_kernels.testing.inputs import BadSample, Sample, feature_map, feature_maps, random_tensor

# Constants of the Triton backend with which these samples take the paths of large inputs:
# tiles of positions and channels, the last of either ragged, several steps of routing, a mixture of some of the
# samples in each program; what has no strategy mixes first
SMALL_TILES = {
    "conv2d.MOST_M": 16,
    "conv2d.MOST_N": 16,
    "conv2d.MOST_K": 16,
    "conv2d.FEWEST_PROGRAMS": 24,
    "conv2d.FEWEST_STEPS": 4,
    "conv2d.SUM_M": 8,
    "conv2d.SUM_N": 4,
    "ACTIVATE_S": 16,
    "ACTIVATE_C": 8,
    "FEWEST_PROGRAMS": 24,
    "ROUTE_C": 8,
    "ROUTE_T": 2,
    "ROUTE_K": 16,
    "MIX_BLOCK": 256,
    "FLOAT32_PRODUCTS_A_BYTE": 1,
    "TILE_POSITIONS": 1,
}
# Seconds; in small tiles the same strategies take the same paths on smaller maps, and many_tiles does as launched
NOT_INTERPRETED = tuple(f"{strategy}_9x22" for strategy in STRATEGIES)

_SAME = {"padding": 1}


def _experts(count: int, out_channels: int, channels: int, kernel: int, **like: Any) -> torch.Tensor:
    scale = (channels * kernel * kernel) ** -0.5
    return random_tensor((count, out_channels, channels, kernel, kernel), **like, seed=5) * scale


def _alpha(batch: int, count: int, **like: Any) -> dict[str, Any]:
    return {"alpha": random_tensor((batch, count), **like, seed=10)}


def _routing(count: int, channels: int, routing: str = "sigmoid", **like: Any) -> dict[str, Any]:
    return {
        "routing_weight": random_tensor((count, channels), **like, seed=11) * channels**-0.5,
        "routing_bias": random_tensor((count,), **like, seed=12),
        "routing": routing,
    }


def _norm(channels: int, num_groups: int, **like: Any) -> dict[str, Any]:
    return {
        "num_groups": num_groups,
        "norm_weight": random_tensor((channels,), **like, seed=1),
        "norm_bias": random_tensor((channels,), **like, seed=2),
        "activation": "silu",
    }


def _epilogue(count: int, batch: int, channels: int, size: tuple[int, int], layout: str, **like: Any) -> dict[str, Any]:
    return {
        "expert_biases": random_tensor((count, channels), **like, seed=6),
        "channel_bias": random_tensor((batch, channels), **like, seed=7),
        "residual": feature_map((batch, channels, *size), layout, **like, seed=8),
        "output_scale": 0.75,
    }


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Every awkward input of the contract, small enough for an interpreter; dtype is that of the feature maps."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    bound = WINOGRAD_RELATIVE_L2 if dtype == torch.float32 else None

    for layout, x in feature_maps((2, 12, 5, 3), **like):
        given: dict[str, Any] = {"x": x, "experts": _experts(3, 8, 12, 3, **like), **_SAME}
        yield Sample(f"plain_{layout}", given | _alpha(2, 3, **like))
        everything = _norm(12, 4, **like) | _routing(3, 12, **like) | _epilogue(3, 2, 8, (5, 3), layout, **like)
        yield Sample(f"everything_{layout}", given | everything | _alpha(1, 3, **like))

    for name, shape, count, out_channels, kernel, changes in (
        ("vector_width", (2, 32, 8, 8), 2, 32, 3, _SAME),
        ("off_vector_width", (1, 30, 7, 9), 3, 14, 3, _SAME),
        ("one_expert", (2, 16, 6, 5), 1, 8, 3, _SAME),
        ("many_experts", (3, 8, 6, 5), 9, 8, 3, _SAME),
        ("one_channel", (1, 1, 6, 6), 2, 1, 3, _SAME),
        ("one_pixel", (3, 8, 1, 1), 2, 8, 3, _SAME),
        ("many_tiles", (2, 16, 37, 21), 2, 16, 3, _SAME),
        ("many_samples", (9, 8, 4, 4), 2, 40, 3, _SAME),
        # more experts than registers hold, for several samples of a block
        ("crowd", (7, 8, 6, 5), 9, 40, 3, _SAME),
        ("no_padding", (2, 8, 6, 7), 2, 8, 3, {}),
        ("uneven_padding", (1, 8, 5, 6), 2, 8, 3, {"padding": (2, 0, 1, 3)}),
        ("stride_2", (2, 8, 9, 8), 2, 16, 3, {"stride": 2, "padding": 1}),
        ("pointwise", (2, 32, 8, 8), 2, 16, 1, {}),
        ("pointwise_stride_2", (1, 8, 5, 6), 2, 8, 1, {"stride": 2}),
        ("empty_batch", (0, 8, 4, 4), 2, 8, 3, _SAME),
    ):
        for layout in ("contiguous", "channels_last"):
            x, experts = feature_map(shape, layout, **like), _experts(count, out_channels, shape[1], kernel, **like)
            given = {"x": x, "experts": experts, **changes}
            # large enough for Winograd's algorithms to pay
            of_size = bound if name in ("vector_width", "many_tiles", "many_samples") else None
            yield Sample(f"{name}_{layout}", given | _alpha(shape[0], count, **like), of_size)
            yield Sample(f"{name}_routed_{layout}", given | _routing(count, shape[1], **like), of_size)

    for layout in ("contiguous", "channels_last"):
        x, experts = feature_map((2, 16, 6, 5), layout, **like), _experts(3, 8, 16, 3, **like)
        given = {"x": x, "experts": experts, **_SAME, **_alpha(2, 3, **like)}
        routed = {"x": x, "experts": experts, **_SAME, **_routing(3, 16, **like)}
        norm = _norm(16, 4, **like)
        yield Sample(f"softmax_{layout}", routed | norm | {"routing": "softmax"})
        yield Sample(f"routing_without_bias_{layout}", routed | norm | {"routing_bias": None})
        yield Sample(f"alpha_beside_routing_{layout}", routed | norm | given)
        yield Sample(f"shared_alpha_{layout}", given | norm | _alpha(1, 3, **like))
        # one mixture of kernels, and of biases one for each sample
        by_sample = _epilogue(3, 2, 8, (6, 5), layout, **like)
        yield Sample(f"shared_alpha_everything_{layout}", given | norm | by_sample | _alpha(1, 3, **like))
        # by hand, one expert alone: a plain convolution
        alone = torch.tensor([[0.0, 1.0, 0.0]], device=device, dtype=dtype)
        yield Sample(f"one_hot_{layout}", given | norm | {"alpha": alone})
        yield Sample(f"silu_{layout}", routed | {"activation": "silu"})
        yield Sample(f"norm_without_activation_{layout}", routed | norm | {"activation": "none"})
        by_sample = {name: random_tensor((2, 16), **like, seed=9) for name in ("norm_weight", "norm_bias")}
        yield Sample(f"norm_by_sample_{layout}", routed | norm | by_sample)
        far = x + (2048 if dtype in (torch.float16, torch.bfloat16) else 30000)
        yield Sample(f"large_mean_{layout}", routed | norm | {"x": far})
        yield Sample(f"shared_channel_bias_{layout}", given | {"channel_bias": random_tensor((1, 8), **like)})
        other = torch.float32 if dtype != torch.float32 else torch.float64
        mixed = {name: p.to(other) if isinstance(p, torch.Tensor) else p for name, p in (norm | routed).items()}
        mixed |= {"x": x, "experts": experts, "expert_biases": random_tensor((3, 8), device, other)}
        yield Sample(f"mixed_dtypes_{layout}", mixed)
        strided = random_tensor((3, 8, 3, 3, 16), **like, seed=5).permute(0, 1, 4, 2, 3) / 12
        yield Sample(f"experts_channels_last_{layout}", given | norm | {"experts": strided})
        yield Sample(f"experts_sliced_{layout}", given | norm | {"experts": _experts(6, 8, 16, 3, **like)[::2]})
        for skip_layout in ("contiguous", "channels_last", "sliced_channels"):
            skip = feature_map((2, 4, 6, 5), skip_layout, **like, seed=4)
            # the third group straddles the seam between x and skip
            both = {"x": x, "skip": skip, "experts": _experts(3, 8, 20, 3, **like), **_SAME, **_norm(20, 5, **like)}
            yield Sample(f"skip_{layout}_{skip_layout}", both | _alpha(2, 3, **like))
            yield Sample(f"skip_routed_{layout}_{skip_layout}", both | _routing(3, 20, **like))
        bare = both | {"num_groups": 0, "norm_weight": None, "norm_bias": None, "activation": "none"}
        yield Sample(f"skip_without_norm_{layout}", bare | _routing(3, 20, **like))
        other_layout = "channels_last" if layout == "contiguous" else "contiguous"
        yield Sample(f"residual_in_other_layout_{layout}", given | _epilogue(3, 2, 8, (6, 5), other_layout, **like))
        strided_residual = _epilogue(3, 2, 8, (3, 3), "sliced_channels", **like)
        yield Sample(f"stride_2_everything_{layout}", routed | norm | strided_residual | {"stride": 2})
        for name, value in (("nan", torch.nan), ("inf", torch.inf)):
            broken = feature_map((2, 16, 6, 5), layout, **like).clone()
            broken[1, 3, 2, 2] = value
            yield Sample(f"{name}_{layout}", routed | norm | {"x": broken})

    for strategy in STRATEGIES:
        for layout in ("contiguous", "channels_last"):
            for height, width in ((8, 8), (6, 5), (9, 22)):
                x, skip = (feature_map((2, 16, height, width), layout, **like, seed=seed) for seed in (0, 4))
                given = {"x": x, "skip": skip, "experts": _experts(3, 40, 32, 3, **like), "padding": (1, 2, 0, 1)}
                given |= _norm(32, 4, **like) | _epilogue(3, 2, 40, (height - 1, width + 1), layout, **like)
                given["strategy"] = strategy
                name = f"{strategy}_{height}x{width}_{layout}"
                yield Sample(name, given | _alpha(2, 3, **like), bound)
                yield Sample(f"{name}_routed", given | _routing(3, 32, "softmax", **like), bound)
        pointwise = {"x": x, "experts": _experts(2, 40, 16, 1, **like), "stride": 2, "strategy": strategy}
        yield Sample(f"{strategy}_pointwise", pointwise | _alpha(2, 2, **like))


def large_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Sizes where a 16-bit grid dimension would overflow."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    x = feature_map((65_537, 4, 2, 2), "channels_last", **like)
    given = {"x": x, "experts": _experts(2, 4, 4, 3, **like), **_SAME, "num_groups": 2, **_routing(2, 4, **like)}
    yield Sample("batch_65537", given)


def bad_samples(device: torch.device | str) -> Iterator[BadSample]:
    """Calls that must be refused, with what the message must name."""
    like: dict[str, Any] = {"device": device, "dtype": torch.float32}
    x, experts, alpha = (random_tensor(shape, **like) for shape in ((2, 12, 5, 3), (3, 8, 12, 3, 3), (2, 3)))
    routing = {"routing_weight": x.new_ones(3, 12), "routing_bias": x.new_ones(3)}

    def bad(name: str, error: type[Exception], says: tuple[str, ...], **changes: Any) -> BadSample:
        return BadSample(name, {"x": x, "experts": experts, "alpha": alpha, **_SAME} | changes, error, says)

    yield bad("three_dimensions", ValueError, ("x", "(2, 12, 5)"), x=x[..., 0])
    yield bad("integer_x", TypeError, ("floating-point", "int64"), x=x.long(), experts=experts.long())
    yield bad("empty_map", ValueError, ("x", "(2, 12, 0, 3)"), x=x[:, :, :0])
    yield bad("too_small", ValueError, ("x", "(2, 12, 5, 1)"), x=x[..., :1], padding=0)
    yield bad("experts_dtype", TypeError, ("experts", "float32", "float16"), experts=experts.half())
    yield bad("experts_rank", ValueError, ("experts", "(8, 12, 3, 3)"), experts=experts[0])
    yield bad("experts_channels", ValueError, ("experts", "12", "(3, 8, 11, 3, 3)"), experts=experts[:, :, :11])
    yield bad("experts_size", ValueError, ("experts", "(3, 8, 12, 2, 2)"), experts=experts[..., :2, :2])
    yield bad("experts_oblong", ValueError, ("experts", "(3, 8, 12, 3, 1)"), experts=experts[..., :1])
    yield bad("no_experts", ValueError, ("experts", "at least one expert"), experts=experts[:0], alpha=alpha[:, :0])
    yield bad("experts_device", ValueError, ("experts", "meta"), experts=experts.to("meta"))
    yield bad("biases_shape", ValueError, ("expert_biases", "(3, 8)", "(8,)"), expert_biases=x.new_ones(8))
    yield bad("biases_dtype", TypeError, ("expert_biases", "floating-point"), expert_biases=x.new_ones(3, 8).int())
    yield bad("nothing_to_mix_by", ValueError, ("alpha", "routing_weight", "neither"), alpha=None)
    yield bad("alpha_experts", ValueError, ("alpha", "(2, 3)", "(2, 2)"), alpha=alpha[:, :2])
    yield bad("alpha_batch", ValueError, ("alpha", "(1, 3)", "(3, 3)"), alpha=x.new_ones(3, 3))
    yield bad("alpha_rank", ValueError, ("alpha", "(2, 3)", "(3,)"), alpha=alpha[0])
    yield bad("alpha_dtype", TypeError, ("alpha", "floating-point"), alpha=alpha.long())
    wide = {"routing_weight": x.new_ones(3, 11)}
    yield bad("routing_channels", ValueError, ("routing_weight", "(3, 12)", "(3, 11)"), **routing | wide)
    few = {"routing_bias": x.new_ones(2)}
    yield bad("routing_bias_experts", ValueError, ("routing_bias", "(3,)", "(2,)"), **routing | few)
    yield bad("routing_bias_alone", ValueError, ("routing_bias", "routing_weight"), routing_bias=x.new_ones(3))
    yield bad("routing_name", ValueError, ("routing", "sigmoid", "'relu'"), routing="relu")
    yield bad("stride", ValueError, ("stride", "3"), stride=3)
    yield bad("negative_padding", ValueError, ("padding", "-1"), padding=-1)
    yield bad("padding_length", ValueError, ("padding", "(left, right, top, bottom)"), padding=(1, 1))
    yield bad("groups_do_not_divide", ValueError, ("num_groups", "12", "5"), num_groups=5)
    yield bad("norm_without_groups", ValueError, ("norm_weight", "num_groups"), norm_weight=x.new_ones(12))
    yield bad("norm_weight_shape", ValueError, ("norm_weight", "11"), num_groups=4, norm_weight=x.new_ones(11))
    yield bad("negative_eps", ValueError, ("eps", "-1"), num_groups=4, eps=-1.0)
    yield bad("nan_eps", ValueError, ("eps", "nan"), num_groups=4, eps=float("nan"))
    yield bad("activation", ValueError, ("activation", "silu", "'gelu'"), activation="gelu")
    yield bad("strategy", ValueError, ("strategy", "mix_first", "'grouped'"), strategy="grouped")
    yield bad("channel_bias_shape", ValueError, ("channel_bias", "(2, 8)", "(3, 8)"), channel_bias=x.new_ones(3, 8))
    yield bad("residual_shape", ValueError, ("residual", "(2, 8, 5, 3)"), residual=x)
    half = x.new_ones(2, 8, 5, 3).half()
    yield bad("residual_dtype", TypeError, ("residual", "float32", "float16"), residual=half)
    yield bad("skip_size", ValueError, ("skip", "(2, 12, 5, 3)", "(2, 12, 5, 4)"), skip=x.new_ones(2, 12, 5, 4))
    yield bad("backend_name", ValueError, ("backend", "'numpy'"), backend="numpy")
