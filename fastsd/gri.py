"""The choice of GRI attention for a patch: which layers, windows and cells."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

WITHOUT_PARAMETERS = ("joint", "agent")  # interactions
LARGEST = 1 << 20  # of a window or cell
_PLACE = re.compile(
    r"(?:(.*)\.)?((down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?attentions\.\d+)\.transformer_blocks\.\d+"
    r"(?:\._orig_mod)?"  # compiled
)
_TRANSFORMER = "Transformer2DModel"  # also the name of the class that a patch puts in its place


@dataclass(frozen=True)
class GRI:
    """Global-regional interactive attention in place of the self-attention of some levels, for :func:`fastsd.patch`.

    It changes what a model computes: see :func:`fastsd_kernels.gri_attention` for the formula, and
    ``docs/gri-attention.md`` for how far from full attention it is. The weights stay as they are, and there are no new
    ones.

    Args:
        window: side of the windows, in tokens of a level's map.
        pool: side of the cells that keys and values are pooled over.
        levels: resolutions, 0 the highest: ``down_blocks.0`` and the last of ``up_blocks``. The deepest is that of
            ``mid_block`` too.
        interaction: ``"joint"`` or ``"agent"``. ``"gated"`` has a parameter, which only training can set: use
            :class:`fastsd.GRIAttnProcessor`.
        mask_own_window: leave out the cells inside a query's own window.

    Raises:
        ValueError: a size below 1 or above 2^20, no or negative levels, or no such interaction.
    """

    window: int = 16
    pool: int = 4
    levels: tuple[int, ...] = (0,)
    interaction: str = "joint"
    mask_own_window: bool = False

    def __post_init__(self) -> None:
        for name in ("window", "pool"):
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= LARGEST:
                raise ValueError(f"{name}: expected an integer from 1 to {LARGEST}; got {size!r}")
        if type(self.mask_own_window) is not bool:
            raise ValueError(f"mask_own_window: expected True or False; got {self.mask_own_window!r}")
        levels = (self.levels,) if type(self.levels) is int else self.levels
        if not isinstance(levels, Sequence) or not levels or any(type(n) is not int or n < 0 for n in levels):
            raise ValueError(f"levels: expected some of 0, 1, ...; got {self.levels!r}")
        object.__setattr__(self, "levels", tuple(sorted(set(levels))))
        if self.interaction not in WITHOUT_PARAMETERS:
            raise ValueError(f"interaction: expected one of {', '.join(WITHOUT_PARAMETERS)}; got {self.interaction!r}")


def check_size(name: str, size: Any) -> None:
    """``size`` is a side, two sides, or ``None``.

    Raises:
        ValueError: it is something else, or a side is below 1 or above 2^20.
    """
    sides = size if isinstance(size, tuple | list) and len(size) == 2 else (size,)
    if size is not None and any(type(side) is not int or not 1 <= side <= LARGEST for side in sides):
        raise ValueError(f"{name}: expected an integer from 1 to {LARGEST}, two of them, or None; got {size!r}")


def level_of(root: nn.Module, path: str) -> int | None:
    """The level of a transformer block of a U-Net or ControlNet in ``root``; ``None`` of any other module.

    Only of those in a ``Transformer2DModel``, which knows the size of the map whose tokens they get.
    """
    match = _PLACE.fullmatch(path)
    if match is None:
        return None
    prefix, transformer, blocks, index = match.groups()
    unet: Any = root.get_submodule(prefix or "")
    if type(unet.get_submodule(transformer)).__name__ != _TRANSFORMER or not hasattr(unet, "down_blocks"):
        return None
    if blocks == "down_blocks":
        return int(index)
    if blocks == "up_blocks":
        return len(unet.up_blocks) - 1 - int(index)
    return len(unet.down_blocks) - 1


def highest_level(model: nn.Module) -> tuple[int, ...]:
    """The level of the highest resolution that has transformers, as :class:`GRI` takes it; 0 where none has."""
    return levels_of(model)[:1] or (0,)


def levels_of(root: nn.Module) -> tuple[int, ...]:
    """The levels of a model that have transformers, the highest resolution first."""
    found = (level_of(root, path) for path, _ in root.named_modules())
    return tuple(sorted({level for level in found if level is not None}))
