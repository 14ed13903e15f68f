"""Plans by name: the pruned U-Nets that others have published, and A-SDM's.

What is removed where is the publications' unless a comment says otherwise; ``docs/compression.md`` has the sources.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fastsd.compress.plan import Plan, PlanError
from fastsd.compress.structure import layers_of, transformers_of
from fastsd.gri import GRI

Config = Mapping[str, Any]


def _layers(levels: int, down: Mapping[int, int], up: Mapping[int, int], config: Config) -> tuple[str, ...]:
    """Residual blocks and the transformers behind them, by level: one of ``down_blocks``, one of ``up_blocks``."""
    removed = []
    for blocks, layers in (("down_blocks", down), ("up_blocks", up)):
        for level, layer in layers.items():
            index = level if blocks == "down_blocks" else levels - 1 - level
            removed.append(f"{blocks}.{index}.resnets.{layer}")
            if config["down_block_types" if blocks == "down_blocks" else "up_block_types"][index].startswith("Cross"):
                removed.append(f"{blocks}.{index}.attentions.{layer}")
    return tuple(removed)


def _bk_base(config: Config) -> tuple[str, ...]:
    levels = len(config["down_block_types"])
    middle = dict.fromkeys(range(levels), 1)
    return _layers(levels, middle, middle, config)


def _bk_small(config: Config) -> tuple[str, ...]:
    return (*_bk_base(config), "mid_block")


def _bk_tiny(config: Config) -> tuple[str, ...]:
    deepest = len(config["down_block_types"]) - 1
    gone = (f"down_blocks.{deepest}.", "up_blocks.0.")
    kept = (path for path in _bk_small(config) if not path.startswith(gone))
    return (*kept, f"down_blocks.{deepest}", f"down_blocks.{deepest - 1}.downsamplers", "up_blocks.0")


def _sdxl(counts_down: list[list[int]], counts_up: list[list[int]]) -> Callable[[Config], tuple[str, ...]]:
    def removed(config: Config) -> tuple[str, ...]:
        gone = ["mid_block.attentions.0", "mid_block.resnets.1"]
        for blocks, wanted, there in (
            ("down_blocks", counts_down, transformers_of(config)[0]),
            ("up_blocks", counts_up, transformers_of(config)[1]),
        ):
            for index, layers in enumerate(wanted):
                for layer, count in enumerate(layers):
                    place = f"{blocks}.{index}.attentions.{layer}.transformer_blocks"
                    kept = _kept(there[index][layer], count)
                    gone += [f"{place}.{k}" for k in range(there[index][layer]) if k not in kept]
        return tuple(gone)

    return removed


def _kept(there: int, count: int) -> tuple[int, ...]:
    """Which blocks of a transformer stay: of ten the 1st, 2nd, 3rd and 7th (others' inference from SSD-1B's weights).

    Where fewer stay, the first of these; that is this library's guess.
    """
    order = (0, 1, 2, 6) if there == 10 else tuple(range(there))
    return order[:count] if count <= len(order) else tuple(range(count))


def _a_sdm(config: Config) -> tuple[str, ...]:
    levels = len(config["down_block_types"])
    return _layers(levels, {0: 1}, {0: 1}, config)


def _a_sdm_experts(config: Config) -> dict[str, tuple[str, ...]]:
    """The kept convolutions of the pruned level, and those of the pruned blocks that do the same job there.

    ``conv2`` has one shape in a level; ``conv1`` only where the inputs are as wide.
    """
    last = len(config["up_block_types"]) - 1
    down, up = "down_blocks.0.resnets", f"up_blocks.{last}.resnets"
    return {
        f"{down}.0.conv1": (f"{down}.1.conv1",),
        f"{down}.0.conv2": (f"{down}.1.conv2",),
        f"{up}.0.conv2": (f"{up}.1.conv2",),
        f"{up}.2.conv1": (f"{up}.1.conv1",),
        f"{up}.2.conv2": (f"{up}.1.conv2",),
    }


_SD_LIKE = "a U-Net of two layers a level and four levels, as SD1.x and SD2.x have"
_XL_LIKE = "a U-Net of two layers a level and three levels with 0, 2 and 10 blocks a transformer, as SDXL has"


def _is_sd(config: Config) -> bool:
    return layers_of(config) == [2] * 4 and config["mid_block_type"] == "UNetMidBlock2DCrossAttn"


def _is_sdxl(config: Config) -> bool:
    return (
        layers_of(config) == [2] * 3
        and config["mid_block_type"] == "UNetMidBlock2DCrossAttn"
        and transformers_of(config)[0][1:] == [[2, 2], [10, 10]]
    )


# name: what it expects, whether a configuration is that, what is removed
_RECIPES: dict[str, tuple[str, Callable[[Config], bool], Callable[[Config], tuple[str, ...]]]] = {
    "bk-sdm-base": (_SD_LIKE, _is_sd, _bk_base),
    "bk-sdm-small": (_SD_LIKE, _is_sd, _bk_small),
    "bk-sdm-tiny": (_SD_LIKE, _is_sd, _bk_tiny),
    "ssd-1b": (_XL_LIKE, _is_sdxl, _sdxl([[], [2, 2], [4, 4]], [[4, 4, 10], [2, 1, 1]])),
    "vega": (_XL_LIKE, _is_sdxl, _sdxl([[], [1, 1], [2, 2]], [[2, 2, 2], [1, 1, 1]])),
    "a-sdm": (_SD_LIKE, _is_sd, _a_sdm),
}
RECIPES = tuple(_RECIPES)


def recipe(name: str, config: Config) -> Plan:
    """The plan that a recipe makes for a U-Net with this configuration.

    Raises:
        PlanError: no recipe has this name, or the U-Net is none that the recipe is for.
    """
    if name not in _RECIPES:
        raise PlanError(f"recipe: expected one of {', '.join(RECIPES)}; got {name!r}")
    expected, serves, removed = _RECIPES[name]
    if not serves(config):
        raise PlanError(
            f"recipe {name!r}: expected {expected}; got down_block_types {list(config['down_block_types'])}, "
            f"layers_per_block {config['layers_per_block']}, mid_block_type {config['mid_block_type']!r}, "
            f"transformer_layers_per_block {config['transformer_layers_per_block']}"
        )
    if name == "a-sdm":
        return Plan(removed(config), experts=_a_sdm_experts(config), gri=GRI(window=16, pool=4, levels=(0,)), name=name)
    return Plan(removed(config), name=name)
