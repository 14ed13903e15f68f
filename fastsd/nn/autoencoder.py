"""diffusers' VAE encoder and decoder: on the CPU channels last from end to end, and the end itself as one op."""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.autoencoders import vae as stock
from torch import Tensor, nn

from fastsd.nn.convolution import convolve, example_convolution, is_inference
from fastsd.nn.plain import why_not_plain, why_stock_everywhere
from fastsd.nn.replacement import Replacement, active_settings


def why_stock(module: stock.Encoder | stock.Decoder) -> str | None:
    """Why ``module`` has to run the stock forward, as a sentence; ``None`` where the fast one gives the same."""
    return (
        why_not_plain(module, "conv_norm_out", nn.GroupNorm)
        or why_not_plain(module, "conv_act", nn.SiLU)
        or why_stock_everywhere()
    )


def _runs_stock(module: stock.Encoder | stock.Decoder, sample: Tensor) -> bool:
    return (
        active_settings(module) is None
        or why_stock(module) is not None
        or (torch.is_grad_enabled() and module.gradient_checkpointing)
        or not isinstance(module.conv_out, nn.Conv2d)
        or not is_inference(module.conv_out, sample)
    )


def _through(module: Any, sample: Tensor, blocks: Iterable[nn.Module], *others: Any) -> Tensor:
    """``conv_out(silu(norm(blocks(conv_in(sample)))))``, in the layout that the stock forward gives."""
    x = module.conv_in(sample)
    if x.device.type == "cpu":
        x = x.contiguous(memory_format=torch.channels_last)
    for block in blocks:
        x = block(x, *others)
    y = convolve(module, "conv_out", x, norm=module.conv_norm_out, activation="silu")
    return y.contiguous() if sample.is_contiguous() and module.conv_out.weight.is_contiguous() else y


class Decoder(Replacement, stock.Decoder):
    """From a latent to an image, eight times as wide and high."""

    def forward(
        self,
        sample: Tensor,  # [B, C, H, W]
        latent_embeds: Tensor | None = None,  # what spatial norms read
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if args or kwargs or latent_embeds is not None or _runs_stock(self, sample):
            return stock.Decoder.forward(self, sample, latent_embeds, *args, **kwargs)
        return _through(self, sample, (self.mid_block, *self.up_blocks), None)


class Encoder(Replacement, stock.Encoder):
    """From an image to the moments of a latent."""

    def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # [B, C, H, W] to [B, C', H/8, W/8]
        if args or kwargs or _runs_stock(self, sample):
            return stock.Encoder.forward(self, sample, *args, **kwargs)
        return _through(self, sample, (*self.down_blocks, self.mid_block))


def example_calls(module: stock.Encoder | stock.Decoder) -> dict[str, tuple[Any, ...]]:
    """The op that the module calls itself in inference, with arguments of its dtype and device."""
    norm: Any = module.conv_norm_out
    x = next(module.parameters()).new_empty((1, norm.num_channels, 8, 8))
    parameters = (norm.num_groups, norm.weight, norm.bias, norm.eps)
    return example_convolution(module, "conv_out", x, *parameters, activation="silu")
