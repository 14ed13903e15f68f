"""Self-attention of U-Nets and ControlNets by GRI attention: only where a patch asks for it, since it approximates."""

import functools
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastsd.gri import GRI, level_of
from fastsd.patching.rule import Rule


def _reject(block: Any) -> str | None:
    from fastsd.nn.gri_attention import why_stock

    return why_stock(block)


def _op_calls(gri: GRI, block: Any) -> dict[str, tuple[Any, ...]]:
    from fastsd.nn.gri_attention import example_calls

    return example_calls(block, gri)


@dataclass(frozen=True)
class GRIRule(Rule):
    """The rule of one choice of GRI attention; :func:`gri_rule` makes it."""

    gri: GRI = field(default_factory=GRI)

    def is_place(self, root: nn.Module, path: str) -> bool:
        return level_of(root, path) in self.gri.levels


@functools.cache  # equal choices have the same rule, so that the second patch with one changes nothing
def gri_rule(gri: GRI) -> GRIRule:
    """The rule that puts ``gri`` where it says."""
    return GRIRule(
        name="gri_attention",
        target="diffusers.models.attention.BasicTransformerBlock",
        replacement="fastsd.nn.gri_attention.BasicTransformerBlock",
        reject=_reject,
        op_calls=functools.partial(_op_calls, gri),
        passes_on=("attn2", "ff", "fuser"),
        approximate=True,
        inside="diffusers.models.transformers.transformer_2d.Transformer2DModel",
        gri=gri,
    )
