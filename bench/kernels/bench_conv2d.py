"""conv2d at the shapes of SD1.5, SDXL and the VAE decoder."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.skip_cases import NUM_GROUPS, by_name
from fastsd_kernels.conv2d.cases import WINOGRAD_RELATIVE_L2
from fastsd_kernels.testing import Sample
from fastsd_kernels.testing.inputs import random_tensor

_SHAPES = (
    (1, 320, 0, 320, 64),
    (1, 640, 320, 320, 64),
    (1, 640, 0, 640, 32),
    (1, 1280, 640, 640, 32),
    (1, 1280, 0, 1280, 16),
    (1, 1280, 1280, 1280, 16),
    (1, 1280, 0, 1280, 8),
    (2, 320, 0, 320, 64),
    (2, 320, 0, 320, 128),
    (1, 512, 0, 512, 64),
    (1, 256, 0, 256, 256),
)
CASES = by_name(_SHAPES)


def sample(name: str, device: torch.device, dtype: torch.dtype) -> Sample:
    """The first convolution of a residual block: norm, SiLU, convolution and time embedding."""
    case = CASES[name]
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    channels = case.all_channels
    given = {
        **case.maps(**like),
        "weight": random_tensor((case.out_channels, channels, 3, 3), **like) * (9 * channels) ** -0.5,
        "bias": torch.zeros(case.out_channels, **like),
        "padding": 1,
        "num_groups": NUM_GROUPS,
        "norm_weight": torch.ones(channels, **like),
        "norm_bias": torch.zeros(channels, **like),
        "activation": "silu",
        "channel_bias": random_tensor((case.batch, case.out_channels), **like),
    }
    return Sample(name, given, WINOGRAD_RELATIVE_L2 if dtype == torch.float32 else None)


def eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: int,
    skip: Tensor | None,
    num_groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    activation: str,
    channel_bias: Tensor,
) -> Tensor:
    z = x if skip is None else torch.cat([x, skip], dim=1)
    z = F.silu(F.group_norm(z, num_groups, norm_weight, norm_bias))
    return F.conv2d(z, weight, bias, padding=padding) + channel_bias[:, :, None, None]
