"""group_norm_silu at the shapes of SD1.5, SDXL and the VAE decoder."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels.testing import Sample, feature_map
from fastsd_kernels.testing.inputs import random_tensor

NUM_GROUPS = 32
FLOPS_PER_ELEMENT = 12  # mean 1, variance 3, normalise and scale 4, SiLU 4


@dataclass(frozen=True)
class Case:
    """A call on square maps; batch 2 is one image with guidance."""

    batch: int
    channels: int
    skip_channels: int
    side: int
    has_time: bool
    layout: str

    @property
    def name(self) -> str:
        channels = f"{self.channels}+{self.skip_channels}" if self.skip_channels else f"{self.channels}"
        time = " +time" if self.has_time else ""
        return f"{self.batch}x{channels}x{self.side}x{self.side}{time} {self.layout}"


_SD15 = (
    (320, 0, 64, False),
    (320, 0, 64, True),
    (640, 0, 32, False),
    (640, 0, 32, True),
    (1280, 0, 16, False),
    (1280, 0, 8, False),
    (320, 320, 64, False),
    (640, 320, 64, False),
    (1280, 640, 32, False),
    (1280, 1280, 16, False),
)
_SDXL = ((320, 0, 128, False), (640, 320, 128, False), (640, 0, 64, False), (1280, 0, 32, False))
_VAE = ((512, 0, 64, False), (256, 0, 256, False), (128, 0, 512, False))

CASES = {
    case.name: case
    for batch, shapes in ((1, _SD15), (2, _SD15), (2, _SDXL), (1, _VAE))
    for shape in shapes
    for layout in ("contiguous", "channels_last")
    for case in [Case(batch, *shape, layout)]
}


def sample(name: str, device: torch.device, dtype: torch.dtype) -> Sample:
    """The call named ``BATCHxCHANNELS[+SKIP]xHEIGHTxWIDTH[ +time] LAYOUT``."""
    case = CASES[name]
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    channels = case.channels + case.skip_channels
    skip_shape = (case.batch, case.skip_channels, case.side, case.side)
    return Sample(
        name,
        {
            "x": feature_map((case.batch, case.channels, case.side, case.side), case.layout, **like),
            "num_groups": NUM_GROUPS,
            "weight": torch.ones(channels, **like),
            "bias": torch.zeros(channels, **like),
            "skip": feature_map(skip_shape, case.layout, **like, seed=1) if case.skip_channels else None,
            "channel_bias": random_tensor((case.batch, channels), **like) if case.has_time else None,
        },
    )


def eager(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor | None,
    channel_bias: Tensor | None,
) -> Tensor:
    if skip is not None:
        x = torch.cat([x, skip], dim=1)
    if channel_bias is not None:
        x = x + channel_bias[:, :, None, None]
    return F.silu(F.group_norm(x, num_groups, weight, bias))


def flops(x: Tensor, skip: Tensor | None, channel_bias: Tensor | None, **others: object) -> int:
    elements = x.numel() + (0 if skip is None else skip.numel())
    return elements * (FLOPS_PER_ELEMENT + (channel_bias is not None))
