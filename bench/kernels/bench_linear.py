"""linear at the layers of transformers of SD1.5 (512², 768²) and SDXL (1024²), against what modules compute."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsd_kernels.linear.reference import linear as definition
from fastsd_kernels.testing import Sample
from fastsd_kernels.testing.inputs import random_tensor


class Case(NamedTuple):
    """``kind``: ``"qkv"``, a projection behind a norm; ``"geglu"``, behind a norm too; ``"out"``, with bias and sum."""

    batch: int
    rows: int
    channels: int
    features: int
    kind: str


def _cases() -> dict[str, Case]:
    found = []
    for batch, side, width in (*((1, side, 320 * 64 // side) for side in (64, 32, 16)), (1, 8, 1280), (1, 96, 320)):
        found += [
            Case(batch, side**2, width, width, "qkv"),
            Case(batch, side**2, width, 3 * width, "qkv"),  # packed
            Case(batch, side**2, width, width, "out"),
            Case(batch, side**2, width, 4 * width, "geglu"),
            Case(batch, side**2, 4 * width, width, "out"),
        ]
    found += [Case(1, 77, 768, width, "text") for width in (320, 640, 1280)]
    found += [Case(1, 1024, 1280, 5120, "geglu"), Case(1, 1024, 5120, 1280, "out")]
    return {f"{case.kind} {case.batch}x{case.rows}x{case.channels}x{case.features}": case for case in found}


CASES = _cases()


def sample(name: str, device: torch.device, dtype: torch.dtype) -> Sample:
    """The call named ``KIND BATCHxROWSxCHANNELSxFEATURES``."""
    case = CASES[name]
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    count = case.features * (2 if case.kind == "geglu" else 1)
    given: dict[str, Any] = {
        "x": random_tensor((case.batch, case.rows, case.channels), **like),
        "weight": random_tensor((count, case.channels), **like, seed=5) * case.channels**-0.5,
    }
    if case.kind in ("qkv", "geglu"):
        given |= {f"norm_{of}": random_tensor((case.channels,), **like, seed=1) for of in ("weight", "bias")}
        given["norm_eps"] = 1e-5
    if case.kind in ("out", "geglu"):
        given["bias"] = random_tensor((count,), **like, seed=6)
    if case.kind == "geglu":
        given["activation"] = "geglu"
    if case.kind == "out":
        given["residual"] = random_tensor((case.batch, case.rows, case.features), **like, seed=8)
    return Sample(name, given)


def eager(x: Tensor, weight: Tensor, **given: Any) -> Tensor:
    """What the modules of a block compute: the op's definition."""
    nothing = {"bias": None, "norm_weight": None, "norm_bias": None, "norm_eps": None, "residual": None}
    return definition(x, weight, **nothing | {"activation": "none"} | given)
