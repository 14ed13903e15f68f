"""T2I-Adapters of the full model, for a pruned U-Net."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsd.adapters.origin import origin_of
from fastsd.adapters.report import FitReport
from fastsd.adapters.twin import check_unwrapped, twin_with
from fastsd.compress.compression import Compression


@dataclass(frozen=True)
class DropMaps:
    """A forward hook of a T2I-Adapter: zeros instead of the maps that a pruned U-Net has no place for.

    Attributes:
        dropped: indices of these.
    """

    dropped: tuple[int, ...]

    def __call__(self, module: nn.Module, args: Any, output: list[Tensor]) -> list[Tensor]:
        # diffusers deals the maps out in order, so something has to stand there; one pixel goes with every size
        return [
            torch.zeros_like(feature[:, :1, :1, :1]) if index in self.dropped else feature
            for index, feature in enumerate(output)
        ]


def fit_t2i_adapter(adapter: Any, unet: Any, *, origin: Compression | None = None) -> tuple[Any, FitReport]:
    """A T2I-Adapter of the full model without the maps that a pruned U-Net has no place for.

    A T2I-Adapter has one map for each level, so most pruned U-Nets take it as it is. But diffusers adds a map in front
    of the downsampler of a block with transformers, and behind that of one without, where the map is too large. So a
    block that has lost all its transformers, and not its downsampler, has no place for its map any more.

    The result is of the same class and shares all modules and weights with ``adapter``, which stays as it is, as with
    :func:`fastsd.adapters.fit_controlnet`.

    Args:
        adapter: a ``T2IAdapter``, or a ``MultiAdapter`` of them; not yet offloaded or compiled.
        unet: the U-Net that it is for; a full one takes all of it.
        origin: see :func:`fastsd.adapters.origin_of`.

    Returns:
        The T2I-Adapter for this U-Net, and what was used and skipped, by the blocks of the full model.

    Raises:
        TypeError, ValueError: see :func:`fastsd.adapters.origin_of`.
        TypeError: ``adapter`` is none of these.
        ValueError: its maps are not those of the full model; it is compiled, or has a forward of its own (an offload).
    """
    from diffusers import MultiAdapter, T2IAdapter

    known = origin_of(unet, origin)
    given, full = getattr(unet, "_orig_mod", unet).config, known.config
    check_unwrapped("adapter", adapter)
    several: Any = MultiAdapter
    single: Any = T2IAdapter
    if not isinstance(adapter, several | single):
        raise TypeError(f"adapter: expected a diffusers T2IAdapter or MultiAdapter; got {type(adapter).__qualname__}")
    widths = list(full["block_out_channels"])
    for each in adapter.adapters if isinstance(adapter, several) else [adapter]:
        channels = list(each.config.channels)
        if channels not in (widths, [*widths, widths[-1]]):
            raise ValueError(
                f"adapter: expected maps of {widths} channels, and maybe one more for the mid block, as the full model "
                f"has that this U-Net was made from; got {channels}"
            )
    levels = len(given["block_out_channels"])
    places = {
        f"down_blocks.{level}": level < levels and _is_in_front(given, level) == _is_in_front(full, level)
        for level in range(len(widths))
    }
    if len(channels) > len(widths):
        places["mid_block"] = levels == len(widths) and given["mid_block_type"] is not None
    used = tuple(place for place, is_there in places.items() if is_there)
    skipped = tuple(place for place in places if place not in used)
    dropped = tuple(index for index, place in enumerate(places) if place in skipped)
    return twin_with(adapter, DropMaps(dropped)), FitReport("T2I-Adapter", used, skipped)


def _is_in_front(config: Mapping[str, Any], level: int) -> bool:
    """Whether diffusers adds the map of a level in front of the block's downsampler, or the block has none."""
    kinds = config["down_block_types"]
    return "CrossAttn" in kinds[level] or level == len(kinds) - 1
