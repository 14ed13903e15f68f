"""diffusers' ResnetBlock2D on conv2d and group_norm_silu."""

from typing import Any

import torch
from diffusers.models import resnet as stock
from torch import Tensor, nn

from fastsd.nn.convolution import convolve, example_convolution, is_fused, normalise
from fastsd.nn.plain import is_idle, why_not_plain, why_stock_everywhere
from fastsd.nn.replacement import Replacement, settings_of


def why_stock(block: stock.ResnetBlock2D) -> str | None:
    """Why ``block`` has to run the stock forward, as a sentence; ``None`` where the fast one gives the same.

    A convolution that is not plain, the time embedding's projection and a dropout are called, so they may be anything.
    """
    return (
        why_not_plain(block, "norm1", nn.GroupNorm)
        or why_not_plain(block, "norm2", nn.GroupNorm)
        or why_not_plain(block, "nonlinearity", nn.SiLU)
        or why_stock_everywhere()
    )


class ResnetBlock2D(Replacement, stock.ResnetBlock2D):
    """Two convolutions, each in one op with the norm and activation before it and the sums behind it.

    ``y = shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + time_emb_proj(silu(temb))))))``, divided by
    ``output_scale_factor``; with up- or downsampling in front of ``conv1`` and of the shortcut.
    """

    def forward(
        self,
        input_tensor: Tensor,  # [B, C_in, H, W]
        temb: Tensor,  # [B, temb_channels]; None where the model has no time embedding
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:  # [B, C_out, H', W']
        settings = settings_of(self)
        if args or kwargs or settings is None or why_stock(self) is not None:
            return stock.ResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)

        x = input_tensor
        to_contiguous = is_fused(self, "conv1", x) and x.is_contiguous() and self.conv2.weight.is_contiguous()
        if to_contiguous:
            # what the op computes in; one conversion for the block instead of several
            x = x.contiguous(memory_format=torch.channels_last)
        first: dict[str, Any] = {"norm": self.norm1, "activation": "silu"}
        shortcut = hidden = x
        if self.upsample is not None or self.downsample is not None:
            shortcut, hidden = self._resample(x, normalise(self, x, **first))
            first = {}

        bias = scale_shift = None
        if self.time_emb_proj is not None:
            # the projection gives [B, C], or [B, 2C] for scale and shift
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            scale_shift = temb.chunk(2, dim=1)
        elif self.time_embedding_norm == "default":
            bias = temb

        # the time embedding is added where it costs no pass: behind the first convolution or before the second norm
        behind = is_fused(self, "conv1", hidden)
        hidden = convolve(self, "conv1", hidden, **first, channel_bias=bias if behind else None)
        second: dict[str, Any] = {
            "norm": self.norm2,
            "input_bias": None if behind else bias,
            "scale_shift": scale_shift,
            "activation": "silu",
        }
        if not is_idle(self, "dropout"):
            hidden, second = self.dropout(normalise(self, hidden, **second)), {}
        if self.conv_shortcut is not None:
            # as stock: spares distributed training a warning about the strides of gradients
            shortcut = convolve(self, "conv_shortcut", shortcut.contiguous() if self.training else shortcut)
        y = convolve(self, "conv2", hidden, **second, residual=shortcut, output_scale=1 / self.output_scale_factor)
        return y.contiguous() if to_contiguous else y

    def _resample(self, shortcut: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self.upsample is not None:
            # as stock: nearest upsampling of large channels_last batches fails
            if hidden.shape[0] >= 64:
                shortcut, hidden = shortcut.contiguous(), hidden.contiguous()
            return self.upsample(shortcut), self.upsample(hidden)
        if self.downsample is not None:
            return self.downsample(shortcut), self.downsample(hidden)
        return shortcut, hidden


def example_calls(block: stock.ResnetBlock2D) -> dict[str, tuple[Any, ...]]:
    """The ops that the block calls in inference, with arguments of the block's dtype and device."""
    calls: dict[str, tuple[Any, ...]] = {}
    for norm, name in ((block.norm1, "conv1"), (block.norm2, "conv2")):
        weight = next(block.parameters()) if norm.weight is None else norm.weight
        x = weight.new_empty((1, norm.num_channels, 8, 8))
        parameters = (norm.num_groups, norm.weight, norm.bias, norm.eps)
        fused = example_convolution(block, name, x, *parameters, activation="silu")
        calls |= fused or {"group_norm_silu": (x, *parameters, "silu", None, None)}
    return calls
