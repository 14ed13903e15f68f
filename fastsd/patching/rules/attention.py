"""The attention layers of transformers."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastsd.patching.rule import Rule


def _reject(module: Any) -> str | None:
    from fastsd.nn.attention import why_stock

    return why_stock(module)


def _op_calls(module: Any) -> dict[str, tuple[Any, ...]]:
    from fastsd.nn.attention import example_calls

    return example_calls(module)


@dataclass(frozen=True)
class AttentionRule(Rule):
    """Of diffusers' one class for many kinds of attention, that of tokens or a map to themselves or to a text."""

    def is_place(self, root: nn.Module, path: str) -> bool:
        from fastsd.nn.attention import is_plain_kind

        module: Any = root.get_submodule(path)
        return is_plain_kind(module)


ATTENTION = AttentionRule(
    name="attention",
    target="diffusers.models.attention_processor.Attention",
    replacement="fastsd.nn.attention.Attention",
    reject=_reject,
    op_calls=_op_calls,
)
