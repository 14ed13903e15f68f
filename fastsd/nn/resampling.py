"""diffusers' Upsample2D and Downsample2D on conv2d."""

from typing import Any

import torch
from diffusers.models import downsampling, upsampling
from torch import Tensor, nn

from fastsd.nn.convolution import convolve, example_convolution
from fastsd.nn.plain import why_stock_everywhere
from fastsd.nn.replacement import Replacement, active_settings


def why_stock(module: upsampling.Upsample2D | downsampling.Downsample2D) -> str | None:
    """Why ``module`` has to run the stock forward, as a sentence; ``None`` where the fast one gives the same."""
    if not module.use_conv or getattr(module, "use_conv_transpose", False):
        return "it has no convolution" if not module.use_conv else "its convolution is transposed"
    if not isinstance(getattr(module, _convolution(module), None), nn.Conv2d):
        return f"{_convolution(module)} is no Conv2d"
    if module.norm is not None:
        return f"it has a norm, a {type(module.norm).__qualname__}"
    if not getattr(module, "interpolate", True):
        return "it does not enlarge the map"
    return why_stock_everywhere()


def _convolution(module: nn.Module) -> str:
    # Downsample2D calls its convolution conv whatever its name
    has_name = isinstance(module, upsampling.Upsample2D) and module.name != "conv"
    return "Conv2d_0" if has_name else "conv"


class Upsample2D(Replacement, upsampling.Upsample2D):
    """``y = conv(nearest(x))`` in one op: the enlarged map is read, not written.

    It is twice the size of ``x``, or ``output_size``.
    """

    def forward(
        self,
        hidden_states: Tensor,  # [B, C, H, W]
        output_size: Any = None,  # height and width
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:  # [B, C_out, H', W']
        x = hidden_states
        size = (2 * x.shape[2], 2 * x.shape[3]) if output_size is None else output_size
        # a trace takes no sizes of its own for an op's numbers
        is_traced = torch.jit.is_tracing()
        if (
            args
            or kwargs
            or active_settings(self) is None
            or why_stock(self) is not None
            or len(size) != 2
            or is_traced
        ):
            return upsampling.Upsample2D.forward(self, hidden_states, output_size, *args, **kwargs)
        return convolve(self, _convolution(self), x, upsample_size=size)


class Downsample2D(Replacement, downsampling.Downsample2D):
    """``y = conv(x)`` of stride 2; without padding of its own, x gets a column on the right and a row below."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, C, H, W]
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:  # [B, C_out, H', W']
        if args or kwargs or active_settings(self) is None or why_stock(self) is not None:
            return downsampling.Downsample2D.forward(self, hidden_states, *args, **kwargs)
        padding = (0, 1, 0, 1) if self.padding == 0 else (0, 0, 0, 0)
        return convolve(self, "conv", hidden_states, padding=padding)


def example_calls(module: upsampling.Upsample2D | downsampling.Downsample2D) -> dict[str, tuple[Any, ...]]:
    """The op that the module calls in inference, with arguments of its dtype and device."""
    conv = getattr(module, _convolution(module))
    return example_convolution(module, _convolution(module), conv.weight.new_empty((1, conv.in_channels, 8, 8)))
