"""The blocks of transformers of U-Nets, ``BasicTransformerBlock``: norms and sums join the projections beside them."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastsd.patching.rule import Rule


def _reject(block: Any) -> str | None:
    from fastsd.nn.transformer_block import why_stock

    return why_stock(block)


@dataclass(frozen=True)
class TransformerBlockRule(Rule):
    """Of diffusers' one class for the blocks of many transformers, those with three layer norms."""

    def is_place(self, root: nn.Module, path: str) -> bool:
        from fastsd.nn.transformer_block import why_another_kind

        block: Any = root.get_submodule(path)
        return why_another_kind(block) is None


TRANSFORMER_BLOCK = TransformerBlockRule(
    name="transformer_block",
    target="diffusers.models.attention.BasicTransformerBlock",
    replacement="fastsd.nn.transformer_block.BasicTransformerBlock",
    reject=_reject,
    passes_on=("attn1", "attn2", "ff", "fuser"),
)
