"""How strongly adapters act on a U-Net, and on parts of it.

Diffusers' methods of these names count on levels with as many layers each, on a transformer in the mid block where
there is a dict, and on the stock class.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# of the whole U-Net, or of its parts by the beginnings of their paths
Scale = float | Mapping[str, float]


def set_ip_adapter_scale(unet: Any, scale: Scale | Sequence[Scale]) -> None:
    """As ``pipe.set_ip_adapter_scale``, for every U-Net.

    Args:
        unet: a ``UNet2DConditionModel`` with IP-Adapters.
        scale: a number for all cross-attentions, or numbers by the beginnings of their paths in this U-Net, such as
            ``{"up_blocks.1.attentions.0": 1.0}``: the longest counts, and what has none gets 0. For several
            IP-Adapters also a list with one of these for each.

    Raises:
        TypeError, ValueError: it has no IP-Adapter, or ``scale`` is none for it; nothing is changed.
    """
    unet = _unet(unet)
    processors = {path: each for path, each in unet.attn_processors.items() if hasattr(each, "to_k_ip")}
    if not processors:
        raise ValueError("unet: expected one with an IP-Adapter; got none")
    scales = _one_for_each(scale, len(next(iter(processors.values())).scale), "IP-Adapters", processors)
    for path, processor in processors.items():
        processor.scale = [_at(path, each, 0.0) for each in scales]


def set_adapters(unet: Any, names: str | Sequence[str], scale: Scale | Sequence[Scale] = 1.0) -> None:
    """As ``unet.set_adapters``, for every U-Net: these LoRAs act, this strongly, and no others.

    Args:
        unet: a ``UNet2DConditionModel`` with these adapters.
        names: theirs.
        scale: a number for all layers, or numbers by the beginnings of their paths in this U-Net, such as
            ``{"mid_block": 0.5}``: the longest counts, and what has none gets 1. For several adapters also a list with
            one of these for each.

    Raises:
        TypeError, ValueError: it has no such adapters, or ``scale`` is none for them; nothing is changed.
    """
    unet = _unet(unet)
    names = [names] if isinstance(names, str) else list(names)
    there = list(getattr(unet, "peft_config", {}))
    if not names or not set(names) <= set(there):
        known = f", {', '.join(there)}" if there else ", which has none"
        raise ValueError(f"names: expected adapters of this U-Net{known}; got {', '.join(names)}")
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, Any] = {
        path: module for path, module in unet.named_modules() if isinstance(module, BaseTunerLayer)
    }
    scales = _one_for_each(scale, len(names), "adapters", layers)
    for path, layer in layers.items():
        layer.set_adapter(names)
        for name, each in zip(names, scales, strict=True):
            layer.set_scale(name, _at(path, each, 1.0))


def _unet(unet: Any) -> Any:
    from diffusers import UNet2DConditionModel

    unet = getattr(unet, "_orig_mod", unet)  # compiled
    unet_class: Any = UNet2DConditionModel
    if not isinstance(unet, unet_class):
        raise TypeError(f"unet: expected a diffusers UNet2DConditionModel; got {type(unet).__qualname__}")
    return unet


def _one_for_each(scale: Any, count: int, what: str, paths: Iterable[str]) -> list[Scale]:
    scales = list(scale) if isinstance(scale, list | tuple) else [scale] * count
    if len(scales) != count:
        raise ValueError(f"scale: expected one for each of the {count} {what}; got {len(scales)}")
    for each in scales:
        numbers = each if isinstance(each, Mapping) else {"": each}
        for start, number in numbers.items():
            if not isinstance(number, int | float):
                raise TypeError(
                    f"scale: expected a number, or numbers by the beginnings of paths; got {type(number).__name__}"
                )
            if not any(_begins(path, start) for path in paths):
                raise ValueError(
                    f"scale: expected beginnings of paths in this U-Net where the {what} act; it has none for {start!r}"
                )
    return scales


def _at(path: str, scale: Scale, otherwise: float) -> float:
    if not isinstance(scale, Mapping):
        return scale
    start = max((start for start in scale if _begins(path, start)), key=len, default=None)
    return otherwise if start is None else scale[start]


def _begins(path: str, start: str) -> bool:
    return not start or f"{path}.".startswith(f"{start}.")
