"""What stands where a compression has taken a module out, with the calls of the module that stood there."""

from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


class SkippedResnet(nn.Module):
    """A residual block reduced to its shortcut: ``y = shortcut(x) / output_scale_factor``.

    The shortcut is the identity where it has no convolution.

    Args:
        block: the one that it takes the place of; it keeps that one's ``conv_shortcut``, under that name.
    """

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__()
        self.conv_shortcut = block.conv_shortcut
        self.output_scale_factor = block.output_scale_factor

    def forward(
        self,
        input_tensor: Tensor,  # [B, C_in, H, W]
        temb: Tensor | None = None,
        *args: Any,
        skip: Tensor | None = None,  # [B, C2, H, W], what an up-block would concatenate behind input_tensor
        **kwargs: Any,
    ) -> Tensor:  # [B, C_out, H, W]
        x = input_tensor if skip is None else torch.cat([input_tensor, skip], dim=1)
        y = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return y if self.output_scale_factor == 1.0 else y / self.output_scale_factor


class SkippedTransformer(nn.Module):
    """A transformer of a U-Net that is not there: passes the map on."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, C, H, W]
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        return Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)
