"""The inputs that linear is tried with."""

from collections.abc import Iterator
from typing import Any

import torch

from fastsd_kernels.testing.inputs import BadSample, Sample, random_tensor
from fastsd_kernels.testing.tokens import LAYOUTS, in_heads

# Constants of the Triton backend with which these samples take the paths of large inputs:
# several tiles of rows, of features, of channels, and of the channels of the moments
SMALL_TILES = {
    "MOST_M": 16,
    "MOST_N": 16,
    "MOST_K": 16,
    "MOMENTS_K": 16,
}


def _weight(out: int, channels: int, **like: Any) -> torch.Tensor:
    return random_tensor((out, channels), **like, seed=5) * channels**-0.5


def _norm(channels: int, **like: Any) -> dict[str, Any]:
    return {
        "norm_weight": random_tensor((channels,), **like, seed=1),
        "norm_bias": random_tensor((channels,), **like, seed=2),
        "norm_eps": 1e-5,
    }


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Every awkward input of the contract, small enough for an interpreter."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}

    def sample(
        name: str, rows: tuple[int, ...], channels: int, out: int, activation: str = "none", **given: Any
    ) -> Sample:
        """``out``: the rows of the weight."""
        x, weight = random_tensor((*rows, channels), **like), _weight(out, channels, **like)
        return Sample(name, {"x": x, "weight": weight, "activation": activation} | given)

    def everything(rows: tuple[int, ...], channels: int, out: int, activation: str) -> dict[str, Any]:
        width = out // 2 if activation == "geglu" else out
        return {
            "bias": random_tensor((out,), **like, seed=6),
            "residual": random_tensor((*rows, width), **like, seed=8),
        } | _norm(channels, **like)

    for layout in LAYOUTS:
        if layout == "packed":  # as wide rows of which one part is read
            x = random_tensor((2, 33, 3, 24), **like)[:, :, 1]
            residual = random_tensor((2, 33, 3, 20), **like, seed=8)[:, :, 2]
        else:
            x = in_heads(2, 3, 11, 24, layout, **like)
            residual = in_heads(2, 3, 11, 20, layout, **like, seed=8)
        given = {"x": x, "weight": _weight(20, 24, **like)}
        yield Sample(f"plain_{layout}", given)
        yield Sample(f"everything_{layout}", given | everything((1,), 24, 20, "gelu") | {"residual": residual})
    for name, rows, channels, out in (
        ("one_row", (1,), 16, 16),
        ("no_leading_dimensions", (), 12, 8),
        ("one_feature", (5, 1), 1, 2),
        ("vector_width", (2, 32), 32, 64),
        ("off_vector_width", (1, 37), 30, 34),
        ("many_rows", (1, 333), 20, 40),
        ("wide", (3, 7), 300, 18),
        ("many_features", (1, 9), 24, 330),
        ("many_batches", (2, 2, 2, 5), 16, 24),
        ("no_rows", (0,), 8, 4),
        ("empty_batch", (0, 5), 8, 4),
    ):
        for activation in ("none", "gelu", "quick_gelu", "geglu"):
            given = everything(rows, channels, out, activation)
            yield sample(f"{name}_{activation}", rows, channels, out, activation, **given)
        yield sample(f"{name}_bare", rows, channels, out)

    given = everything((2, 19), 40, 24, "geglu")
    plain = sample("", (2, 19), 40, 24, "geglu").kwargs
    for left_out in given:
        kept = {name: value for name, value in given.items() if name != left_out}
        if left_out == "norm_eps":
            kept = {name: value for name, value in kept.items() if not name.startswith("norm")}
        yield Sample(f"without_{left_out}", plain | kept)
    yield Sample("bare_norm", plain | {"norm_eps": 1e-5})
    yield Sample("large_eps", plain | given | {"norm_eps": 10.0})
    other = torch.float32 if dtype != torch.float32 else torch.float64
    mixed = {
        name: value.to(other) if isinstance(value, torch.Tensor) and name != "residual" else value
        for name, value in given.items()
    }
    yield Sample("mixed_dtypes", plain | mixed)
    yield Sample("weight_transposed", plain | given | {"weight": _weight(40, 24, **like).t()})
    yield Sample("weight_sliced", plain | given | {"weight": _weight(24, 45, **like)[:, 3:43]})
    yield Sample("weight_rows_apart", plain | given | {"weight": _weight(48, 40, **like)[::2]})
    yield Sample("weight_expanded", plain | given | {"weight": _weight(1, 40, **like).expand(24, 40)})
    # rows an odd number of elements apart, the first of them aligned
    yield Sample("x_rows_apart", plain | given | {"x": random_tensor((2, 19, 43), **like)[..., :40]})
    yield Sample("weight_rows_odd", plain | given | {"weight": _weight(24, 43, **like)[:, :40]})
    yield Sample("weight_off_alignment", plain | given | {"weight": random_tensor((961,), **like)[1:].view(24, 40)})
    yield Sample("bias_strided", plain | given | {"bias": random_tensor((48,), **like)[::2]})

    far = plain["x"] + (2048 if dtype in (torch.float16, torch.bfloat16) else 30000)
    yield Sample("large_mean", plain | given | {"x": far})
    yield Sample("constant_rows", plain | given | {"x": torch.full_like(plain["x"], 3.0)})
    # the tails: exactly 0 and z beyond what float32 tells apart, and all that lies between
    one = torch.ones((1, 1), **like)
    huge = torch.tensor([[-3e4], [3e4], [-0.0], [0.0]], **like)
    for activation, tail in (("gelu", 15), ("quick_gelu", 60)):
        steps = torch.linspace(-tail, tail, 601, device=device).to(dtype)[:, None]
        yield Sample(f"tails_of_{activation}", {"x": steps, "weight": one, "activation": activation})
        yield Sample(f"huge_into_{activation}", {"x": huge, "weight": one, "activation": activation})
    for name, value in (("nan", torch.nan), ("inf", torch.inf)):
        # torch's own gelu of inf is NaN in float32 and inf in float64
        for activation in ("none", "quick_gelu", "geglu") if name == "inf" else ("none", "gelu", "quick_gelu", "geglu"):
            broken = sample(name, (2, 19), 40, 24, activation).kwargs
            broken["x"][1, 5, 3] = value
            yield Sample(f"{name}_in_x_{activation}", broken)
            yield Sample(f"{name}_in_normed_x_{activation}", broken | _norm(40, **like))
        weight = plain["weight"].clone()
        weight[2, 1] = value
        yield Sample(f"{name}_in_weight", plain | {"weight": weight})
    for of, value in (
        ("x", -torch.inf), ("weight", -torch.inf), ("bias", torch.nan), ("bias", torch.inf), ("norm_weight", torch.nan),
        ("norm_bias", -torch.inf), ("residual", torch.nan), ("residual", -torch.inf),
    ):  # fmt: skip
        broken = plain | given
        broken[of] = broken[of].clone()
        broken[of].view(-1)[17] = value
        yield Sample(f"{value}_among_{of}", broken)


def large_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Sizes where a 16-bit grid dimension would overflow."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    for rows in ((65_537, 1), (65_537 * 16,)):
        x = random_tensor((*rows, 4), **like)
        yield Sample(f"{rows[0]}_rows", {"x": x, "weight": _weight(6, 4, **like), "activation": "geglu"})


def bad_samples(device: torch.device | str) -> Iterator[BadSample]:
    """Calls that must be refused, with what the message must name."""
    x, weight = random_tensor((2, 3, 8), device, torch.float32), random_tensor((6, 8), device, torch.float32)
    given = {"x": x, "weight": weight}

    def bad(name: str, error: type[Exception], says: tuple[str, ...], **changes: Any) -> BadSample:
        return BadSample(name, given | changes, error, says)

    yield bad("a_number", ValueError, ("x", "[..., in]"), x=x[0, 0, 0])
    yield bad("channels", ValueError, ("weight", "(out, 8)", "(6, 7)"), weight=weight[:, :7])
    yield bad("weight_of_a_convolution", ValueError, ("weight", "(6, 8, 1, 1)"), weight=weight[:, :, None, None])
    yield bad("no_channels", ValueError, ("weight", "at least one", "(6, 0)"), x=x[..., :0], weight=weight[:, :0])
    yield bad("no_features", ValueError, ("weight", "at least one", "(0, 8)"), weight=weight[:0])
    yield bad("activation", ValueError, ("activation", "geglu", "'relu'"), activation="relu")
    yield bad("odd_gates", ValueError, ("weight", "gates", "5 rows"), weight=weight[:5], activation="geglu")
    yield bad("bias", ValueError, ("bias", "(6,)", "(3,)"), bias=x.new_ones(3))
    yield bad("bias_of_geglu", ValueError, ("bias", "(6,)", "(3,)"), bias=x.new_ones(3), activation="geglu")
    yield bad("norm_weight", ValueError, ("norm_weight", "(8,)", "(6,)"), norm_weight=x.new_ones(6), norm_eps=1e-5)
    yield bad("norm_bias", ValueError, ("norm_bias", "(8,)", "(1, 8)"), norm_bias=x.new_ones(1, 8), norm_eps=1e-5)
    yield bad("norm_without_eps", ValueError, ("norm_weight", "norm_eps=None"), norm_weight=x.new_ones(8))
    yield bad("negative_eps", ValueError, ("norm_eps", "-1"), norm_eps=-1.0)
    yield bad("nan_eps", ValueError, ("norm_eps", "nan"), norm_eps=float("nan"))
    yield bad("residual", ValueError, ("residual", "(2, 3, 6)", "(2, 3, 8)"), residual=x)
    yield bad("residual_of_geglu", ValueError, ("residual", "(2, 3, 3)", "(2, 3, 8)"), residual=x, activation="geglu")
    yield bad("residual_that_broadcasts", ValueError, ("residual", "(2, 3, 6)", "(6,)"), residual=x.new_ones(6))
    yield bad("integer_x", TypeError, ("x", "floating-point", "int64"), x=x.long())
    yield bad("dtype_of_weight", TypeError, ("weight", "float32", "float16"), weight=weight.half())
    yield bad("dtype_of_residual", TypeError, ("residual", "float32", "float64"), residual=x.new_ones(2, 3, 6).double())
    yield bad("integer_bias", TypeError, ("bias", "int64"), bias=x.new_ones(6).long())
    yield bad("device_of_weight", ValueError, ("weight", "cpu", "meta"), weight=weight.to("meta"))
    yield bad("backend_name", ValueError, ("backend", "'numpy'"), backend="numpy")
