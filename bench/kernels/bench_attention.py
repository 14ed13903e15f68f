"""attention at the layers of SD1.5 (512², 768²), SDXL (1024²) and the VAE, against ``scaled_dot_product_attention``."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels.testing import Sample
from fastsd_kernels.testing.tokens import in_heads, tokens


class Case(NamedTuple):
    """``keys``: those of the map, as many as queries, or of a text of 77 tokens; ``layout``: of the projections."""

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    layout: str = "token_major"


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
# q, k and v of one product, as after fuse_qkv_projections()
CASES |= {
    f"packed {name}": case._replace(layout="packed")
    for name, case in CASES.items()
    if case.queries == case.keys and case.heads == 8 and case.batch == 1
}


def sample(name: str, device: torch.device, dtype: torch.dtype) -> Sample:
    """The call named ``BATCHxHEADSxQUERIESxKEYSxWIDTH``: tokens as projections give them."""
    batch, heads, queries, keys, width, layout = CASES[name]
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    if layout == "packed":
        given = tokens(batch, heads, queries, width, layout, **like)
    else:
        counts = (queries, keys, keys)
        given = tuple(in_heads(batch, heads, n, width, layout, **like, seed=i) for i, n in enumerate(counts))
    return Sample(name, dict(zip("qkv", given, strict=True)))


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)
