"""diffusers' ResnetBlock2D on group_norm_silu."""

from typing import Any

from diffusers.models import resnet as stock
from torch import Tensor, nn

from fastsd.nn.convolution import convolve
from fastsd.nn.plain import why_not_plain, why_stock_everywhere
from fastsd.nn.replacement import Replacement, settings_of
from fastsd_kernels import group_norm_silu


def why_stock(block: stock.ResnetBlock2D) -> str | None:
    """Why ``block`` has to run the stock forward, as a sentence; ``None`` where the fast one gives the same.

    The convolutions, the time embedding's projection and the dropout are called, so they may be anything.
    """
    return (
        why_not_plain(block, "norm1", nn.GroupNorm)
        or why_not_plain(block, "norm2", nn.GroupNorm)
        or why_not_plain(block, "nonlinearity", nn.SiLU)
        or why_stock_everywhere()
    )


class ResnetBlock2D(Replacement, stock.ResnetBlock2D):
    """GroupNorm, SiLU and the sum with the time embedding in two ops; the convolutions as their map's size suits them.

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

        hidden = _norm(input_tensor, self.norm1, "silu", settings.backend)
        shortcut, hidden = self._resample(input_tensor, hidden)
        hidden = convolve(self, "conv1", hidden)

        if self.time_emb_proj is not None:
            # the projection gives [B, C], or [B, 2C] for scale and shift
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            scale, shift = temb.chunk(2, dim=1)
            hidden = _norm(hidden, self.norm2, "none", settings.backend)
            hidden = self.nonlinearity(hidden * (1 + scale) + shift)
        else:
            bias = temb if self.time_embedding_norm == "default" else None
            hidden = _norm(hidden, self.norm2, "silu", settings.backend, bias)

        hidden = convolve(self, "conv2", self.dropout(hidden))
        if self.conv_shortcut is not None:
            # as stock: spares distributed training a warning about the strides of gradients
            shortcut = self.conv_shortcut(shortcut.contiguous() if self.training else shortcut)
        output = shortcut + hidden
        return output if self.output_scale_factor == 1.0 else output / self.output_scale_factor

    def _resample(self, shortcut: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self.upsample is not None:
            # as stock: nearest upsampling of large channels_last batches fails
            if hidden.shape[0] >= 64:
                shortcut, hidden = shortcut.contiguous(), hidden.contiguous()
            return self.upsample(shortcut), self.upsample(hidden)
        if self.downsample is not None:
            return self.downsample(shortcut), self.downsample(hidden)
        return shortcut, hidden


def _norm(
    x: Tensor,  # [B, C, H, W]
    norm: nn.GroupNorm,
    activation: str,
    backend: str | None,
    bias: Tensor | None = None,  # broadcasts to x
) -> Tensor:
    channel_bias = None
    if bias is not None:
        # anything but one number per sample and channel broadcasts or promotes, as only a plain sum can
        if bias.dtype == x.dtype and bias.shape[1:] == (x.shape[1], 1, 1) and bias.shape[0] in (1, x.shape[0]):
            channel_bias = bias.flatten(1)
        else:
            x = x + bias
    return group_norm_silu(
        x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation, channel_bias=channel_bias, backend=backend
    )


def example_calls(block: stock.ResnetBlock2D) -> dict[str, tuple[Any, ...]]:
    """The op that the block calls, with arguments of the block's dtype and device."""
    norm = block.norm1
    x = next(block.parameters()).new_empty((1, norm.num_channels, 8, 8))
    return {"group_norm_silu": (x, norm.num_groups, norm.weight, norm.bias, norm.eps, "silu", None, None)}
