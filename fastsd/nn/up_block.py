"""diffusers' up-blocks, which hand the skip connection to the residual block instead of concatenating it."""

from typing import Any

import torch
from diffusers.models.unets import unet_2d_blocks as stock
from torch import Tensor, nn

from fastsd.nn.plain import why_not_plain, why_stock_everywhere
from fastsd.nn.replacement import Replacement, active_settings, call_as
from fastsd.nn.resnet_block import ResnetBlock2D
from fastsd.nn.skipped_resnet import SkippedResnet

_TAKE_SKIPS = (ResnetBlock2D, SkippedResnet)
_FREEU = ("s1", "s2", "b1", "b2")


def _runs_stock(block: nn.Module) -> bool:
    """FreeU edits map and skip connection before they meet, and checkpointing calls the block again."""
    return (
        active_settings(block) is None
        or all(getattr(block, name, None) for name in _FREEU)
        or (torch.is_grad_enabled() and bool(block.gradient_checkpointing))
        or why_stock_everywhere() is not None
    )


def _join(blocks: nn.ModuleList, index: int, x: Tensor, skip: Tensor, temb: Tensor | None) -> Tensor:
    """``resnet(cat(x, skip), temb)``, without the concatenation where nobody else sees it."""
    resnet = blocks[index]
    fast = type(resnet)
    if fast in _TAKE_SKIPS and why_not_plain(blocks, str(index), fast) is None:
        # stock would drop the skip without a word
        return call_as(resnet, fast, x, temb, skip=skip)
    return resnet(torch.cat([x, skip], dim=1), temb)


def _as_stock(block: Any, x: Tensor) -> Tensor:
    """The layout that the last up-block of a U-Net gives, behind which stock modules read the map.

    On the CPU the replaced modules keep maps channels last, whatever the model's memory format is.
    """
    first = block.resnets[0]
    weight = getattr(getattr(first, "conv1", None) or first.conv_shortcut, "weight", None)
    is_last = not block.upsamplers
    return x.contiguous() if is_last and x.device.type == "cpu" and weight is not None and weight.is_contiguous() else x


class UpBlock2D(Replacement, stock.UpBlock2D):
    """Residual blocks that each take a skip connection, then upsampling."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, C, H, W]
        res_hidden_states_tuple: tuple[Tensor, ...],  # [B, C', H, W] each, the last for the first block
        temb: Tensor | None = None,
        upsample_size: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if args or kwargs or _runs_stock(self):
            return stock.UpBlock2D.forward(
                self, hidden_states, res_hidden_states_tuple, temb, upsample_size, *args, **kwargs
            )
        x, skips = hidden_states, res_hidden_states_tuple
        for index in range(len(self.resnets)):
            x = _join(self.resnets, index, x, skips[-1 - index], temb)
        for upsampler in self.upsamplers or ():
            x = upsampler(x, upsample_size)
        return _as_stock(self, x)


class CrossAttnUpBlock2D(Replacement, stock.CrossAttnUpBlock2D):
    """Residual blocks that each take a skip connection, a transformer behind each, then upsampling."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, C, H, W]
        res_hidden_states_tuple: tuple[Tensor, ...],  # [B, C', H, W] each, the last for the first block
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: Any = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        scale = (cross_attention_kwargs or {}).get("scale")
        # scale: only the stock forward knows what to say of it
        if args or kwargs or scale is not None or _runs_stock(self):
            given = (
                encoder_hidden_states,
                cross_attention_kwargs,
                upsample_size,
                attention_mask,
                encoder_attention_mask,
            )
            return stock.CrossAttnUpBlock2D.forward(
                self, hidden_states, res_hidden_states_tuple, temb, *given, *args, **kwargs
            )
        attention: dict[str, Any] = {
            "encoder_hidden_states": encoder_hidden_states,
            "cross_attention_kwargs": cross_attention_kwargs,
            "attention_mask": attention_mask,
            "encoder_attention_mask": encoder_attention_mask,
        }
        x, skips = hidden_states, res_hidden_states_tuple
        for index, transformer in zip(range(len(self.resnets)), self.attentions, strict=False):
            x = _join(self.resnets, index, x, skips[-1 - index], temb)
            x = transformer(x, **attention, return_dict=False)[0]
        for upsampler in self.upsamplers or ():
            x = upsampler(x, upsample_size)
        return _as_stock(self, x)
