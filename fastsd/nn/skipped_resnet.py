"""A residual block that a compression has reduced to its shortcut, on resnet_block."""

from typing import Any

import torch
from torch import Tensor

from fastsd.nn import skip as stock
from fastsd.nn.convolution import is_chosen, is_inference, is_op_convolution
from fastsd.nn.plain import why_stock_everywhere
from fastsd.nn.replacement import Replacement, active_settings
from fastsd_kernels import resnet_block


class SkippedResnet(Replacement, stock.SkippedResnet):
    """``y = shortcut(cat(x, skip)) / output_scale_factor``, without the concatenation."""

    def forward(
        self,
        input_tensor: Tensor,  # [B, C_in, H, W]
        temb: Tensor | None = None,
        *args: Any,
        skip: Tensor | None = None,  # [B, C2, H, W]
        **kwargs: Any,
    ) -> Tensor:  # [B, C_out, H, W]
        settings = active_settings(self)
        if settings is None or why_stock_everywhere() is not None or not _is_one_call(self, input_tensor, skip):
            return stock.SkippedResnet.forward(self, input_tensor, temb, *args, skip=skip, **kwargs)
        x = input_tensor.contiguous(memory_format=torch.channels_last)
        return resnet_block(x, **_arguments(self, skip), backend=settings.backend)


def _is_one_call(block: stock.SkippedResnet, x: Tensor, skip: Tensor | None) -> bool:
    shortcut = block.conv_shortcut
    others = () if skip is None else (skip,)
    return (
        shortcut is not None
        and is_op_convolution(block, "conv_shortcut")
        and shortcut.kernel_size == (1, 1)
        and shortcut.stride == (1, 1)
        and shortcut.padding == (0, 0)
        and x.dim() == 4
        and all(other.dtype == x.dtype and other[:, 0].shape == x[:, 0].shape for other in others)
        and x.shape[1] + sum(other.shape[1] for other in others) == shortcut.in_channels
        and x.shape[2:].numel() > 0
        and is_inference(shortcut, x, *others)
        and is_chosen(x, shortcut)
    )


def _arguments(block: stock.SkippedResnet, skip: Tensor | None) -> dict[str, Any]:
    shortcut: Any = block.conv_shortcut
    return {
        "conv1_weight": None,
        "conv2_weight": None,
        "skip": skip,
        "shortcut_weight": shortcut.weight,
        "shortcut_bias": shortcut.bias,
        "output_scale": 1 / block.output_scale_factor,
    }


def example_calls(block: stock.SkippedResnet) -> dict[str, tuple[Any, ...]]:
    """The op that the module calls in inference, with arguments of its dtype and device; none for an identity."""
    shortcut = block.conv_shortcut
    if shortcut is None:
        return {}
    x = next(shortcut.parameters()).new_empty((1, shortcut.in_channels, 8, 8))
    with torch.no_grad():
        if not _is_one_call(block, x, None):
            return {}
    norms = (32, None, None, None, None, None, 1e-5, None)
    return {
        "resnet_block": (
            *(x, None, None, None, None, None, *norms),
            *(shortcut.weight, shortcut.bias, 1 / block.output_scale_factor),
        )
    }
