"""``algorithm="direct"``: torch's own convolution (oneDNN, cuDNN) between this library's passes."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels.conv2d.reference import epilogue, prologue
from fastsd_kernels.group_norm_silu import group_norm_silu
from fastsd_kernels.layout import dense, is_channels_last


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    skip: Tensor | None,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor | None,
    activation: str,
    upsample_size: Sequence[int] | None,
    channel_bias: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
) -> Tensor:
    """The arguments and the result of the op; concatenation, norm and activation are one pass, the rest as torch's."""
    channels_last = is_channels_last(x)
    by_sample = any(p is not None and p.dim() == 2 for p in (norm_weight, norm_bias))
    if num_groups and mean is None and not by_sample:
        x = group_norm_silu(x, num_groups, norm_weight, norm_bias, eps, activation, skip=skip)
        skip, num_groups, norm_weight, norm_bias, activation = None, 0, None, None, "none"
    z = prologue(x, skip, num_groups, norm_weight, norm_bias, eps, mean, rstd, activation, upsample_size)
    left, right, top, bottom = padding
    if left != right or top != bottom:
        z, left, top = F.pad(z, (left, right, top, bottom)), 0, 0
    y = F.conv2d(z, weight, None if bias is None else bias.to(z.dtype), stride, (top, left))
    return dense(epilogue(y, channel_bias, residual, output_scale), channels_last)
