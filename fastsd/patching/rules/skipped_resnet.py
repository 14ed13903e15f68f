"""Residual blocks that a compression has reduced to their shortcut: two maps read where they are."""

from typing import Any

from fastsd.patching.rule import Rule


def _accept(block: Any) -> str | None:
    from fastsd.nn.plain import why_stock_everywhere

    return why_stock_everywhere()


def _op_calls(block: Any) -> dict[str, tuple[Any, ...]]:
    from fastsd.nn.skipped_resnet import example_calls

    return example_calls(block)


SKIPPED_RESNET = Rule(
    name="skipped_resnet",
    target="fastsd.nn.skip.SkippedResnet",
    replacement="fastsd.nn.skipped_resnet.SkippedResnet",
    reject=_accept,
    op_calls=_op_calls,
)
