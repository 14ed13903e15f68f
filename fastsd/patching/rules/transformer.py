"""The transformers of U-Nets, ``Transformer2DModel``: norm and projections around the blocks, which keep their own."""

from typing import Any

from fastsd.patching.rule import Rule


def _reject(transformer: Any) -> str | None:
    from fastsd.nn.transformer import why_stock

    return why_stock(transformer)


def _op_calls(transformer: Any) -> dict[str, tuple[Any, ...]]:
    from fastsd.nn.transformer import example_calls

    return example_calls(transformer)


TRANSFORMER = Rule(
    name="transformer",
    target="diffusers.models.transformers.transformer_2d.Transformer2DModel",
    replacement="fastsd.nn.transformer.Transformer2DModel",
    reject=_reject,
    op_calls=_op_calls,
    passes_on=("transformer_blocks",),
)
