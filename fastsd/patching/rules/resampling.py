"""diffusers' Upsample2D and Downsample2D where they have a convolution."""

from typing import Any

from fastsd.patching.rule import Rule


def _reject(module: Any) -> str | None:
    from fastsd.nn.resampling import why_stock

    return why_stock(module)


def _op_calls(module: Any) -> dict[str, tuple[Any, ...]]:
    from fastsd.nn.resampling import example_calls

    return example_calls(module)


UPSAMPLE = Rule(
    name="upsample",
    target="diffusers.models.upsampling.Upsample2D",
    replacement="fastsd.nn.resampling.Upsample2D",
    reject=_reject,
    op_calls=_op_calls,
)
DOWNSAMPLE = Rule(
    name="downsample",
    target="diffusers.models.downsampling.Downsample2D",
    replacement="fastsd.nn.resampling.Downsample2D",
    reject=_reject,
    op_calls=_op_calls,
)
