"""The layers of transformers' CLIP text encoders, and of the image encoders, which are of the same classes."""

from typing import Any

from fastsd.patching.rule import Rule


def _reject(module: Any) -> str | None:
    from fastsd.nn.text_encoder import why_stock

    return why_stock(module)


def _calls_of_layer(layer: Any) -> dict[str, tuple[Any, ...]]:
    from fastsd.nn.text_encoder import example_layer

    return example_layer(layer)


def _calls_of_attention(attn: Any) -> dict[str, tuple[Any, ...]]:
    from fastsd.nn.text_encoder import example_attention

    return example_attention(attn)


CLIP_LAYER = Rule(
    name="clip_layer",
    target="transformers.models.clip.modeling_clip.CLIPEncoderLayer",
    replacement="fastsd.nn.text_encoder.CLIPEncoderLayer",
    reject=_reject,
    op_calls=_calls_of_layer,
    passes_on=("self_attn",),
)
CLIP_ATTENTION = Rule(
    name="clip_attention",
    target="transformers.models.clip.modeling_clip.CLIPAttention",
    replacement="fastsd.nn.text_encoder.CLIPAttention",
    reject=_reject,
    op_calls=_calls_of_attention,
)
