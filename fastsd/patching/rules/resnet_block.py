"""diffusers' residual block: both GroupNorm-SiLU pairs, and the time embedding before the second."""

from typing import Any

from fastsd.patching.rule import Rule


def _reject(block: Any) -> str | None:
    from fastsd.nn.resnet_block import why_stock

    return why_stock(block)


def _op_calls(block: Any) -> dict[str, tuple[Any, ...]]:
    from fastsd.nn.resnet_block import example_calls

    return example_calls(block)


RESNET_BLOCK = Rule(
    name="resnet_block",
    target="diffusers.models.resnet.ResnetBlock2D",
    replacement="fastsd.nn.resnet_block.ResnetBlock2D",
    reject=_reject,
    op_calls=_op_calls,
)
