"""cond_conv2d as the layers of A-SDM's U-Net call it (a CondConv2d: routing, then 3×3), at the shapes of SD1.5.

``eager`` is the op's definition in plain PyTorch: kernels mixed for each sample, then one convolution of B groups.
``loop``: the same with a convolution for each sample. ``plain``, a yardstick, computes another function: fastsd's
conv2d with the first kernel alone, as a patched model has it where nothing is mixed.

One layout, channels last, which a patched model has between its blocks. All 60 cases take many
minutes on two cores; ``--cases x32x32``, ``--cases e4`` or ``--cases 2x`` take some of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd.cli.table import text_table
from fastsd_kernels import cond_conv2d, conv2d
from fastsd_kernels.cond_conv2d import STRATEGIES
from fastsd_kernels.conv2d.cases import WINOGRAD_RELATIVE_L2
from fastsd_kernels.testing import Sample, feature_map
from fastsd_kernels.testing.inputs import random_tensor

Function = Callable[..., Tensor]

# each takes milliseconds: more calls in a run would tell no more
MOST_CALLS = 1


class Case(NamedTuple):
    """So many samples of a square map, as many channels out as in, and so many kernels to mix."""

    batch: int
    channels: int
    side: int
    experts: int


CASES = {
    f"{batch}x{channels}x{side}x{side} e{experts}": Case(batch, channels, side, experts)
    for channels, side in ((320, 64), (640, 32), (1280, 16), (1280, 8))
    for experts in (1, 2, 3, 4, 8)
    for batch in (1, 2, 8)
}


def sample(name: str, device: torch.device, dtype: torch.dtype) -> Sample:
    """The call named ``BATCHxCHANNELSxHEIGHTxWIDTH eEXPERTS``."""
    return sample_of(CASES[name], name, device, dtype)


def sample_of(case: Case, name: str, device: torch.device, dtype: torch.dtype) -> Sample:
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    batch, channels, side, experts = case
    given = {
        "x": feature_map((batch, channels, side, side), "channels_last", **like),
        "experts": random_tensor((experts, channels, channels, 3, 3), **like, seed=1) * (9 * channels) ** -0.5,
        "expert_biases": random_tensor((experts, channels), **like, seed=2),
        "alpha": random_tensor((1, experts), **like, seed=3),
        "routing_weight": random_tensor((experts, channels), **like, seed=4) * channels**-0.5,
        "routing_bias": random_tensor((experts,), **like, seed=5),
        "padding": 1,
    }
    return Sample(name, given, WINOGRAD_RELATIVE_L2 if dtype == torch.float32 else None)


def eager(
    x: Tensor,
    experts: Tensor,
    expert_biases: Tensor,
    alpha: Tensor,
    routing_weight: Tensor,
    routing_bias: Tensor,
    padding: int,
) -> Tensor:
    kernels, biases = _mixtures(x, experts, expert_biases, alpha, routing_weight, routing_bias)
    maps = x.reshape(1, -1, *x.shape[2:])
    y = F.conv2d(maps, kernels.flatten(0, 1), biases.flatten(), padding=padding, groups=x.shape[0])
    return y.view(x.shape[0], -1, *y.shape[2:])


def others(device: torch.device, with_compile: bool = False) -> dict[str, Function]:
    """The op's function in other ways, held to its contract: plain PyTorch, and each strategy by its name."""
    return {"loop": loop} | {strategy: _forced(strategy) for strategy in STRATEGIES}


def loop(
    x: Tensor,
    experts: Tensor,
    expert_biases: Tensor,
    alpha: Tensor,
    routing_weight: Tensor,
    routing_bias: Tensor,
    padding: int,
) -> Tensor:
    """A convolution for each sample."""
    kernels, biases = _mixtures(x, experts, expert_biases, alpha, routing_weight, routing_bias)
    return torch.cat([F.conv2d(x[b : b + 1], kernels[b], biases[b], padding=padding) for b in range(x.shape[0])])


def yardsticks() -> dict[str, tuple[Function, Function]]:
    """Other functions, to hold the op's time against, each with its definition in plain PyTorch."""
    return {"plain": (plain, _plain_definition)}


def plain(x: Tensor, experts: Tensor, expert_biases: Tensor, padding: int, **routing: Tensor) -> Tensor:
    """A convolution with the first kernel alone."""
    return conv2d(x, experts[0], expert_biases[0], padding=padding)


def _plain_definition(x: Tensor, experts: Tensor, expert_biases: Tensor, padding: int, **routing: Tensor) -> Tensor:
    return F.conv2d(x, experts[0], expert_biases[0], padding=padding)


def conclusions(medians: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Of each case the fastest strategy, what is chosen against it, and the overhead over a plain convolution.

    Args:
        medians: seconds of each provider of each case.

    Returns:
        ``case``; ``fastest``: the strategy; ``chosen_to_fastest``: time of what the op chooses by itself / that of the
        fastest strategy; ``overhead``: time of what it chooses / time of the plain convolution - 1. What was not timed
        is ``None``.
    """
    found = []
    for case, seconds in medians.items():
        strategies = {name: seconds[name] for name in STRATEGIES if name in seconds}
        fastest = min(strategies, key=lambda name: strategies[name], default=None)
        own, plain = seconds.get("fastsd"), seconds.get("plain")
        found.append(
            {
                "case": case,
                "fastest": fastest,
                "chosen_to_fastest": None if own is None or fastest is None else own / strategies[fastest],
                "overhead": None if own is None or plain is None else own / plain - 1,
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """:func:`conclusions` as text."""

    def part(value: float | None, text: str) -> str:
        return "-" if value is None else text.format(value)

    return text_table(
        ("case", "overhead over a plain convolution", "time / that of the fastest", "fastest strategy"),
        (
            (
                row["case"],
                part(row["overhead"], "{:+.0%}"),
                part(row["chosen_to_fastest"], "{:.2f}×"),
                row["fastest"] or "-",
            )
            for row in found
        ),
    )


def _mixtures(
    x: Tensor,  # [B, C, H, W]
    experts: Tensor,  # [E, K, C, 3, 3]
    expert_biases: Tensor,  # [E, K]
    alpha: Tensor,  # [1, E]
    routing_weight: Tensor,  # [E, C]
    routing_bias: Tensor,  # [E]
) -> tuple[Tensor, Tensor]:  # [B, K, C, 3, 3], [B, K]
    weights = alpha + F.linear(x.mean((2, 3)), routing_weight, routing_bias).sigmoid()
    return torch.tensordot(weights, experts, dims=1), weights @ expert_biases


def _forced(strategy: str) -> Function:
    return lambda **kwargs: cond_conv2d(**kwargs, strategy=strategy)
