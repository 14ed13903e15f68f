"""Cases of ops that read a map and, in an up-block, a skip connection behind it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fastsd_kernels.testing import feature_map

NUM_GROUPS = 32


@dataclass(frozen=True)
class Case:
    """Square maps of so many channels, and the channels of the result."""

    batch: int
    channels: int
    skip_channels: int
    out_channels: int
    side: int
    layout: str

    @property
    def name(self) -> str:
        channels = f"{self.channels}+{self.skip_channels}" if self.skip_channels else f"{self.channels}"
        return f"{self.batch}x{channels}->{self.out_channels}x{self.side}x{self.side} {self.layout}"

    @property
    def all_channels(self) -> int:
        return self.channels + self.skip_channels

    def maps(self, **like: Any) -> dict[str, torch.Tensor | None]:
        """``x`` and ``skip``."""
        size = (self.side, self.side)
        skip = (self.batch, self.skip_channels, *size)
        return {
            "x": feature_map((self.batch, self.channels, *size), self.layout, **like),
            "skip": feature_map(skip, self.layout, **like) if self.skip_channels else None,
        }


def by_name(shapes: Iterable[tuple[int, int, int, int, int]]) -> dict[str, Case]:
    """Every shape in both layouts, by ``BATCHxCHANNELS[+SKIP]->OUTxHEIGHTxWIDTH LAYOUT``."""
    cases = [Case(*shape, layout) for shape in shapes for layout in ("contiguous", "channels_last")]
    return {case.name: case for case in cases}
