"""The block out of a backend's convolution: each reads concatenation, norm and activation, and adds what is added."""

from collections.abc import Callable

import torch
from torch import Tensor

_SAME = (1, 1, 1, 1)
_NONE = (0, 0, 0, 0)


def compose(
    convolve: Callable[..., Tensor],
    x: Tensor,  # [B, C1, H, W]
    conv1_weight: Tensor | None,  # [K, C, 3, 3], C = C1 + C2
    conv2_weight: Tensor | None,  # [K, K, 3, 3]
    conv1_bias: Tensor | None,  # [K]
    conv2_bias: Tensor | None,  # [K]
    skip: Tensor | None,  # [B, C2, H, W]
    num_groups: int,
    norm1_weight: Tensor | None,  # [C]
    norm1_bias: Tensor | None,  # [C]
    num_groups_out: int | None,
    norm2_weight: Tensor | None,  # [K] or [B, K]
    norm2_bias: Tensor | None,  # [K] or [B, K]
    eps: float,
    channel_bias: Tensor | None,  # [B, K] or [1, K]
    shortcut_weight: Tensor | None,  # [K, C, 1, 1]
    shortcut_bias: Tensor | None,  # [K]
    output_scale: float,
) -> Tensor:  # [B, K, H, W]
    """The arguments and the result of the op.

    ``convolve`` takes those of conv2d, in the order of its schema without ``backend``.
    """
    is_shortcut = conv1_weight is None
    shortcut = x
    if shortcut_weight is not None:
        bare = (0, None, None, eps, None, None, "none", None)
        scale = output_scale if is_shortcut else 1.0
        shortcut = convolve(x, shortcut_weight, shortcut_bias, 1, _NONE, skip, *bare, None, None, scale, None)
    elif skip is not None:
        # a sum with the block's input needs that input
        shortcut = torch.cat([x, skip], dim=1)
    if is_shortcut:
        return shortcut if shortcut_weight is not None else shortcut * output_scale
    norm1 = (num_groups, norm1_weight, norm1_bias, eps, None, None, "silu", None)
    h = convolve(x, conv1_weight, conv1_bias, 1, _SAME, skip, *norm1, channel_bias, None, 1.0, None)
    groups = num_groups if num_groups_out is None else num_groups_out
    norm2 = (groups, norm2_weight, norm2_bias, eps, None, None, "silu", None)
    return convolve(h, conv2_weight, conv2_bias, 1, _SAME, None, *norm2, None, shortcut, output_scale, None)
