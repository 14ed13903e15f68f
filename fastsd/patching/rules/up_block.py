"""diffusers' up-blocks of residual blocks: the skip connection is read where it is, not concatenated."""

from typing import Any

from fastsd.patching.rule import Rule


def _accept(block: Any) -> None:
    return None


UP_BLOCK = Rule(
    name="up_block",
    target="diffusers.models.unets.unet_2d_blocks.UpBlock2D",
    replacement="fastsd.nn.up_block.UpBlock2D",
    reject=_accept,
    passes_on=("resnets", "upsamplers"),
)
CROSS_ATTENTION_UP_BLOCK = Rule(
    name="cross_attention_up_block",
    target="diffusers.models.unets.unet_2d_blocks.CrossAttnUpBlock2D",
    replacement="fastsd.nn.up_block.CrossAttnUpBlock2D",
    reject=_accept,
    passes_on=("resnets", "attentions", "upsamplers"),
)
