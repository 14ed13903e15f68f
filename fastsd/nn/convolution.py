"""A 3×3 convolution called as stock, or computed as one matrix product where that is faster."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsd.nn.plain import why_not_plain
from fastsd_kernels.layout import is_channels_last

# oneDNN reorders the weights at every call. With this many weights for each position of the batch, the reordering costs
# more than writing out the columns of a matrix product does; measured, the two are even at about half of it. It also
# bounds the columns' memory: for a 3×3 convolution of C channels they take 9 C / 40 000 of the weights' bytes at most.
WEIGHTS_PER_POSITION = 40_000

_STOCK_FORWARD = nn.Conv2d._conv_forward


def convolve(owner: nn.Module, name: str, x: Tensor) -> Tensor:
    """``owner.<name>(x)``: through the module, unless it is plain and a matrix product is the faster way.

    Args:
        owner: the module that holds the convolution.
        name: its attribute.
        x: ``[B, C, H, W]``.

    Returns:
        ``[B, C', H', W']``; the same to rounding either way, in ``x``'s memory format.
    """
    conv = getattr(owner, name)
    if why_not_plain(owner, name, nn.Conv2d) is None and is_faster_as_product(conv, x):
        return as_product(x, conv.weight, conv.bias)
    return conv(x)


def is_faster_as_product(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether :func:`as_product` serves ``conv`` on ``x`` and is faster: float32 inference on the CPU, small maps."""
    return (
        x.device.type == "cpu"
        and x.dtype == conv.weight.dtype == torch.float32
        and (conv.bias is None or conv.bias.dtype == torch.float32)
        # what seamless tiling and the like override
        and "_conv_forward" not in conv.__dict__
        and nn.Conv2d._conv_forward is _STOCK_FORWARD
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and x.dim() == 4
        and x.shape[1] == conv.in_channels
        and x.numel() > 0
        and conv.weight.numel() >= WEIGHTS_PER_POSITION * x.shape[0] * x.shape[2] * x.shape[3]
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and _is_plain_float32()
    )


def _is_plain_float32() -> bool:
    """Whether oneDNN is on and neither it nor matrix products may round float32 to less."""
    mkldnn: Any = torch.backends.mkldnn
    return mkldnn.enabled and {mkldnn.matmul.fp32_precision, mkldnn.conv.fp32_precision} <= {"none", "ieee"}


def as_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``conv2d(x, weight, bias, padding=1)`` as weight matrix times columns (im2col).

    Args:
        x: ``[B, C, H, W]``, not empty; contiguous or channels_last.
        weight: ``[C', C, 3, 3]``; its memory format decides the order of a column's elements, so that it is not copied.
        bias: ``[C']`` or ``None``.

    Returns:
        ``[B, C', H, W]`` in ``x``'s memory format.
    """
    batch, _, height, width = x.shape
    if weight.is_contiguous():
        matrix, columns = weight.flatten(1), F.unfold(x, 3, padding=1)  # [C', K], [B, K, HW]; K: channel, row, column
    else:
        windows = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).unfold(1, 3, 1).unfold(2, 3, 1)  # [B, H, W, C, 3, 3]
        rows = windows.permute(0, 1, 2, 4, 5, 3).reshape(batch, height * width, -1)
        matrix, columns = weight.permute(0, 2, 3, 1).flatten(1), rows.mT  # K: row, column, channel
    bias = weight.new_zeros(1) if bias is None else bias
    if is_channels_last(x):
        y = torch.baddbmm(bias, columns.mT, matrix.mT.expand(batch, -1, -1))
        return y.view(batch, height, width, -1).permute(0, 3, 1, 2)
    y = torch.baddbmm(bias[:, None], matrix.expand(batch, -1, -1), columns)
    return y.view(batch, -1, height, width)
