"""diffusers' ResnetBlock2D on resnet_block; where a leaf has to be called, on conv2d and group_norm_silu."""

from typing import Any

import torch
from diffusers.models import resnet as stock
from torch import Tensor, nn

from fastsd.nn.convolution import (
    convolve,
    example_convolution,
    is_chosen,
    is_inference,
    is_one_op,
    is_op_convolution,
    norm_parameters,
    normalise,
    row_of,
)
from fastsd.nn.plain import is_idle, why_not_plain, why_stock_everywhere
from fastsd.nn.replacement import Replacement, active_settings
from fastsd_kernels import resnet_block


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
    """Two convolutions, norms and activations and the shortcut in one op; part by part where a leaf has to be called.

    On the CPU the result is channels last, which the op computes in: so maps are converted once in a U-Net, not twice
    in each block.

    ``y = shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + time_emb_proj(silu(temb))))))``, divided by
    ``output_scale_factor``; with up- or downsampling in front of ``conv1`` and of the shortcut.
    """

    def forward(
        self,
        input_tensor: Tensor,  # [B, C_in, H, W]
        temb: Tensor,  # [B, temb_channels]; None where the model has no time embedding
        *args: Any,
        skip: Tensor | None = None,  # [B, C2, H, W], what an up-block would concatenate behind input_tensor
        **kwargs: Any,
    ) -> Tensor:  # [B, C_out, H', W']
        settings = active_settings(self)
        lacks_temb = temb is None and self.time_embedding_norm == "scale_shift"
        if args or kwargs or settings is None or lacks_temb or why_stock(self) is not None:
            return stock.ResnetBlock2D.forward(self, _joined(input_tensor, skip), temb, *args, **kwargs)
        if self.time_emb_proj is not None:
            # the projection gives [B, C], or [B, 2C] for scale and shift
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        whole = one_call(self, input_tensor, skip, temb)
        if whole is None:
            return ResnetBlock2D._in_parts(self, _joined(input_tensor, skip), temb)
        return resnet_block(**whole, backend=settings.backend)

    def _in_parts(self, x: Tensor, temb: Tensor) -> Tensor:
        """The forward with one op for each convolution that is plain; ``temb`` is projected."""
        if is_one_op(self, "conv1", x):
            x = x.contiguous(memory_format=torch.channels_last)
        first: dict[str, Any] = {"norm": self.norm1, "activation": "silu"}
        shortcut = hidden = x
        if self.upsample is not None or self.downsample is not None:
            shortcut, hidden = ResnetBlock2D._resample(self, x, normalise(self, x, **first))
            first = {}

        bias = temb if self.time_embedding_norm == "default" else None
        scale_shift = temb.chunk(2, dim=1) if self.time_embedding_norm == "scale_shift" else None
        # the time embedding is added where it costs no pass: behind the first convolution or before the second norm
        behind = is_one_op(self, "conv1", hidden)
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
        return convolve(self, "conv2", hidden, **second, residual=shortcut, output_scale=1 / self.output_scale_factor)

    def _resample(self, shortcut: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self.upsample is not None:
            # as stock: nearest upsampling of large channels_last batches fails
            if hidden.shape[0] >= 64:
                shortcut, hidden = shortcut.contiguous(), hidden.contiguous()
            return self.upsample(shortcut), self.upsample(hidden)
        if self.downsample is not None:
            return self.downsample(shortcut), self.downsample(hidden)
        return shortcut, hidden


def one_call(block: stock.ResnetBlock2D, x: Tensor, skip: Tensor | None, temb: Tensor | None) -> dict[str, Any] | None:
    """The op's arguments in its order, for the whole block; ``None`` where it has to be computed part by part.

    ``temb``: projected, ``[B, C, 1, 1]`` or ``[B, 2C, 1, 1]``.
    """
    conv1, conv2, shortcut = block.conv1, block.conv2, block.conv_shortcut
    others = () if skip is None else (skip,)
    if not (
        block.upsample is None
        and block.downsample is None
        and is_idle(block, "dropout")
        and all(is_op_convolution(block, name) for name in _convolutions(block))
        and _is_same(conv1, 3)
        and _is_same(conv2, 3)
        and (shortcut is None or _is_same(shortcut, 1))
        and conv1.out_channels == conv2.in_channels == conv2.out_channels
        and conv1.out_channels == (conv1.in_channels if shortcut is None else shortcut.out_channels)
        and block.norm1.eps == block.norm2.eps
        and x.dim() == 4
        and all(other.dtype == x.dtype and other[:, 0].shape == x[:, 0].shape for other in others)
        and x.shape[1] + sum(other.shape[1] for other in others) == conv1.in_channels
        and x.shape[2:].numel() > 0
        and all(
            is_inference(conv, x, temb, *others, *_of_norms(block)) and is_chosen(x, conv)
            for conv in (getattr(block, name) for name in _convolutions(block))
        )
    ):
        return None
    scale_shift = row = None
    if block.time_embedding_norm == "scale_shift" and temb is not None:
        scale, shift = temb.chunk(2, dim=1)
        scale_shift = scale, shift
    elif temb is not None and block.time_embedding_norm == "default":
        row = row_of(temb, x, conv1.out_channels)
        if row is None:
            return None
    norm2 = norm_parameters(x, block.norm2, scale_shift)
    if norm2 is None:
        return None
    return {
        "x": x.contiguous(memory_format=torch.channels_last),
        "conv1_weight": conv1.weight,
        "conv2_weight": conv2.weight,
        "conv1_bias": conv1.bias,
        "conv2_bias": conv2.bias,
        "skip": skip,
        "num_groups": block.norm1.num_groups,
        "norm1_weight": block.norm1.weight,
        "norm1_bias": block.norm1.bias,
        "num_groups_out": block.norm2.num_groups,
        "norm2_weight": norm2["norm_weight"],
        "norm2_bias": norm2["norm_bias"],
        "eps": block.norm1.eps,
        "channel_bias": row,
        "shortcut_weight": None if shortcut is None else shortcut.weight,
        "shortcut_bias": None if shortcut is None else shortcut.bias,
        "output_scale": 1 / block.output_scale_factor,
    }


def _convolutions(block: stock.ResnetBlock2D) -> tuple[str, ...]:
    return ("conv1", "conv2") if block.conv_shortcut is None else ("conv1", "conv2", "conv_shortcut")


def _of_norms(block: stock.ResnetBlock2D) -> tuple[Tensor | None, ...]:
    return block.norm1.weight, block.norm1.bias, block.norm2.weight, block.norm2.bias


def _is_same(conv: nn.Conv2d, kernel: int) -> bool:
    """Whether ``conv`` has a kernel of this size, and leaves the map's size as it is."""
    return conv.kernel_size == (kernel, kernel) and conv.stride == (1, 1) and conv.padding == (kernel // 2, kernel // 2)


def _joined(x: Tensor, skip: Tensor | None) -> Tensor:
    return x if skip is None else torch.cat([x, skip], dim=1)


def example_calls(block: stock.ResnetBlock2D) -> dict[str, tuple[Any, ...]]:
    """The ops that the block calls in inference, with arguments of the block's dtype and device."""
    with torch.no_grad():
        first = next(block.parameters())
        x = first.new_empty((1, block.norm1.num_channels, 8, 8))
        temb = None
        if block.time_emb_proj is not None:
            channels = block.norm2.num_channels * (2 if block.time_embedding_norm == "scale_shift" else 1)
            temb = first.new_empty((1, channels, 1, 1))
        whole = one_call(block, x, None, temb)
    if whole is not None:
        return {"resnet_block": tuple(whole.values())}
    calls: dict[str, tuple[Any, ...]] = {}
    for norm, name in ((block.norm1, "conv1"), (block.norm2, "conv2")):
        weight = first if norm.weight is None else norm.weight
        x = weight.new_empty((1, norm.num_channels, 8, 8))
        parameters = (norm.num_groups, norm.weight, norm.bias, norm.eps)
        fused = example_convolution(block, name, x, *parameters, activation="silu")
        calls |= fused or {"group_norm_silu": (x, *parameters, "silu", None, None)}
    return calls
