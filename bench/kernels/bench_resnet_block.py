"""resnet_block at the shapes of SD1.5, SDXL and the VAE decoder."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.skip_cases import NUM_GROUPS, by_name
from fastsd_kernels.conv2d.cases import WINOGRAD_RELATIVE_L2
from fastsd_kernels.resnet_block.cases import block
from fastsd_kernels.testing import Sample
from fastsd_kernels.testing.inputs import random_tensor

_SHAPES = (
    (1, 320, 0, 320, 64),
    (1, 640, 320, 320, 64),
    (1, 640, 0, 640, 32),
    (1, 1280, 640, 640, 32),
    (1, 1280, 0, 1280, 16),
    (1, 1280, 1280, 1280, 16),
    (1, 1280, 1280, 1280, 8),
    (2, 320, 0, 320, 64),
    (2, 320, 0, 320, 128),
    (1, 512, 0, 512, 64),
)
CASES = by_name(_SHAPES)


def sample(name: str, device: torch.device, dtype: torch.dtype) -> Sample:
    """A residual block; with channels of a skip connection, one of an up-block."""
    case = CASES[name]
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    given = {
        **case.maps(**like),
        **block(case.all_channels, case.out_channels, NUM_GROUPS, **like),
        "channel_bias": random_tensor((case.batch, case.out_channels), **like),
    }
    return Sample(name, given, WINOGRAD_RELATIVE_L2 if dtype == torch.float32 else None)


def eager(
    x: Tensor,
    conv1_weight: Tensor,
    conv2_weight: Tensor,
    conv1_bias: Tensor,
    conv2_bias: Tensor,
    num_groups: int,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    channel_bias: Tensor,
    skip: Tensor | None,
    shortcut_weight: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
) -> Tensor:
    z = x if skip is None else torch.cat([x, skip], dim=1)
    h = F.silu(F.group_norm(z, num_groups, norm1_weight, norm1_bias))
    h = F.conv2d(h, conv1_weight, conv1_bias, padding=1) + channel_bias[:, :, None, None]
    h = F.silu(F.group_norm(h, num_groups, norm2_weight, norm2_bias))
    shortcut = z if shortcut_weight is None else F.conv2d(z, shortcut_weight, shortcut_bias)
    return shortcut + F.conv2d(h, conv2_weight, conv2_bias, padding=1)
