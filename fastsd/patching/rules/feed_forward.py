"""The feed-forward layers of transformers."""

from typing import Any

from fastsd.patching.rule import Rule


def _reject(module: Any) -> str | None:
    from fastsd.nn.feed_forward import why_stock

    return why_stock(module)


def _op_calls(module: Any) -> dict[str, tuple[Any, ...]]:
    from fastsd.nn.feed_forward import example_calls

    return example_calls(module)


FEED_FORWARD = Rule(
    name="feed_forward",
    target="diffusers.models.attention.FeedForward",
    replacement="fastsd.nn.feed_forward.FeedForward",
    reject=_reject,
    op_calls=_op_calls,
)
