"""Where each module of a pruned U-Net was in the full model that adapters are trained on."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastsd.compress.compression import Compression
from fastsd.compress.configuration import Config, arguments_of
from fastsd.compress.plan import PlanError
from fastsd.compress.recipes import RECIPES, recipe
from fastsd.compress.structure import Structure, layers_of, structure_of, transformers_of

_FULL_LAYERS = 2
_FULL_MID_BLOCK = "UNetMidBlock2DCrossAttn"
_SDXL_TRANSFORMERS = (1, 2, 10)
# what has an entry for each level
_BY_LEVEL = ("block_out_channels", "attention_head_dim", "num_attention_heads", "transformer_layers_per_block")


@dataclass(frozen=True)
class Origin:
    """The full model that a U-Net was made from.

    Attributes:
        config: of the full model.
        structures: what was made of it, step by step; none where the U-Net is the full model.
    """

    config: dict[str, Any]
    structures: tuple[Structure, ...]

    def source_of(self, path: str) -> str:
        """Where a module of the U-Net is in the full model."""
        for structure in reversed(self.structures):
            path = structure.source_of(path)
        return path

    @cached_property
    def full(self) -> Any:
        """The full model, without weights (on ``meta``)."""
        from fastsd.compress.model import build_stock

        return build_stock(self.config)


def attentions_of(unet: Any) -> tuple[str, ...]:
    """Paths of the attention modules in the order in which diffusers lists their processors: down, up, mid."""
    return tuple(name.removesuffix(".processor") for name in unet.attn_processors)


def skips_of(config: Config) -> Iterator[tuple[str, int]]:
    """The maps that the down-blocks hand to the up-blocks: the path of the module that makes each, and its width."""
    widths, layers = list(config["block_out_channels"]), layers_of(config)
    yield "conv_in", widths[0]
    for level, width in enumerate(widths):
        for layer in range(layers[level]):
            yield f"down_blocks.{level}.resnets.{layer}", width
        if level < len(widths) - 1:
            yield f"down_blocks.{level}.downsamplers.0", width


def origin_of(unet: Any, origin: Compression | None = None) -> Origin:
    """The full model that a U-Net was made from.

    A U-Net that :func:`fastsd.compress` has made, or that :func:`fastsd.load` has read with its plan, knows it. Others
    are recognised by their configuration: SD1.x, SD2.x and SDXL themselves, and the published BK-SDM, SSD-1B and Vega.

    Args:
        unet: a ``UNet2DConditionModel``.
        origin: what it was made from, where nothing of this is so: the configuration of the full model, and the plan.

    Raises:
        TypeError: ``unet`` is no ``UNet2DConditionModel``, or ``origin`` no ``Compression``.
        ValueError: it is not known what the U-Net was made from, or it was not made so.
    """
    from diffusers import UNet2DConditionModel

    unet = getattr(unet, "_orig_mod", unet)  # compiled
    unet_class: Any = UNet2DConditionModel
    if not isinstance(unet, unet_class):
        raise TypeError(f"unet: expected a diffusers UNet2DConditionModel; got {type(unet).__qualname__}")
    if origin is not None and not isinstance(origin, Compression):
        raise TypeError(f"origin: expected a fastsd.adapters.Compression, or None; got {type(origin).__name__}")
    config = arguments_of(unet.config)
    made = origin or Compression.of(unet)
    if made is None:
        made = _recognised(config)
        if made is None and not _is_full(config):
            raise ValueError(
                "unet: expected one that fastsd.compress has made, the full SD1.x, SD2.x or SDXL, or a published "
                f"BK-SDM, SSD-1B or Vega; got {_summary(config)}: pass origin=fastsd.adapters.Compression(config of "
                "the full model, plan)"
            )
    structures: list[Structure] = []
    while made is not None:
        structure = structure_of(made.base_config, made.plan)
        if not _agree(structure.config, config):
            raise ValueError(
                f"unet: expected what the plan makes of its origin, {_summary(structure.config)}; got "
                f"{_summary(config)}"
            )
        structures.insert(0, structure)
        config = arguments_of(made.base_config)
        made = made.before or _recognised(config)
    return Origin(config, tuple(structures))


def _recognised(config: Config) -> Compression | None:
    """What the recipe whose result has this configuration was carried out on."""
    for name in RECIPES:
        for base in _full_configs(config):
            try:
                plan = recipe(name, base)
                structure = structure_of(base, plan)
            except PlanError:
                continue
            if structure.is_stock and plan.gri is None and _agree(structure.config, config):
                return Compression(base, plan)
    return None


def _full_configs(config: Config) -> Iterator[dict[str, Any]]:
    """Configurations of full models that this one may have been made from."""
    full = {
        **config,
        "layers_per_block": _FULL_LAYERS,
        "mid_block_type": _FULL_MID_BLOCK,
        "reverse_transformer_layers_per_block": None,
    }
    if len(config["down_block_types"]) == len(_SDXL_TRANSFORMERS):
        yield {**full, "transformer_layers_per_block": list(_SDXL_TRANSFORMERS)}
    counts = config["transformer_layers_per_block"]
    if not isinstance(counts, int) and not all(isinstance(count, int) for count in counts):
        return  # other counts within a level: nothing that the recipes below keep
    yield full
    deeper = {key: [*full[key], full[key][-1]] for key in _BY_LEVEL if isinstance(full.get(key), list | tuple)}
    yield {
        **full,
        **deeper,
        "down_block_types": [*full["down_block_types"], "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *full["up_block_types"]],
    }


def _is_full(config: Config) -> bool:
    for name in RECIPES:
        try:
            recipe(name, config)
        except PlanError:
            continue
        return True
    return False


def _agree(a: Config, b: Config) -> bool:
    """Of two configurations: whether they describe the same blocks, however that is written."""
    return _blocks(a) == _blocks(b)


def _blocks(config: Config) -> tuple[Any, ...]:
    lists = (list(config[key]) for key in ("down_block_types", "up_block_types", "block_out_channels"))
    return (*lists, layers_of(config), transformers_of(config), config["mid_block_type"])


def _summary(config: Config) -> str:
    return (
        f"down_block_types {list(config['down_block_types'])}, layers_per_block {config['layers_per_block']}, "
        f"transformer_layers_per_block {config['transformer_layers_per_block']}, "
        f"mid_block_type {config['mid_block_type']!r}"
    )
