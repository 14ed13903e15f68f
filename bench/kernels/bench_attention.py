"""attention at the layers of SD1.5 (512², 768²), SDXL (1024²) and the VAE, against ``scaled_dot_product_attention``."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels.testing import Sample
from fastsd_kernels.testing.tokens import in_heads


class Case(NamedTuple):
    """``keys``: those of the map, as many as queries, or of a text of 77 tokens."""

    batch: int
    heads: int
    queries: int
    keys: int
    width: int


_LAYERS = (
    *((1, 8, side**2, width) for side, width in ((64, 40), (32, 80), (16, 160), (8, 160))),
    (1, 8, 96**2, 40),
    (2, 8, 64**2, 40),
    *((1, heads, side**2, 64) for heads, side in ((10, 64), (20, 32))),
)
CASES = {
    f"{batch}x{heads}x{queries}x{keys}x{width}": Case(batch, heads, queries, keys, width)
    for batch, heads, queries, width in _LAYERS
    for keys in (queries, 77)
} | {"1x1x4096x4096x512": Case(1, 1, 4096, 4096, 512)}


def sample(name: str, device: torch.device, dtype: torch.dtype) -> Sample:
    """The call named ``BATCHxHEADSxQUERIESxKEYSxWIDTH``: tokens as projections give them."""
    batch, heads, queries, keys, width = CASES[name]
    counts = (("q", queries), ("k", keys), ("v", keys))
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    return Sample(
        name,
        {
            of: in_heads(batch, heads, count, width, "token_major", **like, seed=seed)
            for seed, (of, count) in enumerate(counts)
        },
    )


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)
