"""IP-Adapter that was trained on the full model, for a pruned U-Net."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastsd.adapters.origin import Origin, attentions_of, origin_of
from fastsd.adapters.report import FitReport
from fastsd.adapters.state import check_names, check_tensors
from fastsd.compress.compression import Compression

_PARTS = ("image_proj", "ip_adapter")


def fit_ip_adapter(
    state_dict: Mapping[str, Any], unet: Any, *, origin: Compression | None = None
) -> tuple[dict[str, dict[str, Tensor]], FitReport]:
    """Give each cross-attention of a pruned U-Net the weights that it has in the full model.

    An IP-Adapter's file counts the attention modules of the full model (down, up, mid; ``1.to_k_ip.weight``), and
    diffusers hands what it finds to the modules of the U-Net at hand in their order. Where some are missing, the later
    ones get the weights of others: without a word as long as these are as wide, else diffusers fails on a shape. Here
    they go by name, and the numbers are written anew.

    The result is loaded as the IP-Adapter would be: ``pipe.load_ip_adapter(result, subfolder="", weight_name="",
    image_encoder_folder=None)``.

    Args:
        state_dict: ``{"image_proj": …, "ip_adapter": …}``, or the flat names of a safetensors file; of any variant
            (Plus, Full Face, FaceID with its LoRA): what stands behind the number is not looked at. No tensor is
            copied.
        unet: the U-Net that the IP-Adapter is for; a full one takes all of it.
        origin: see :func:`fastsd.adapters.origin_of`.

    Returns:
        The IP-Adapter for this U-Net, and what was used and skipped.

    Raises:
        TypeError, ValueError: see :func:`fastsd.adapters.origin_of`.
        TypeError: ``state_dict`` does not map names to tensors.
        ValueError: it does not have the two parts, or not the numbers or the shapes of the full model.
    """
    known = origin_of(unet, origin)
    parts = _nested(state_dict)
    names = attentions_of(known.full)
    by_number = _by_number(parts["ip_adapter"], names)
    _check(by_number, known)
    fitted: dict[str, Tensor] = {}
    used = []
    numbers = {path: number for number, path in enumerate(names)}
    for place, path in enumerate(attentions_of(getattr(unet, "_orig_mod", unet))):
        number = numbers[known.source_of(path)]
        if number in by_number:
            used.append(names[number])
            fitted |= {f"{place}.{rest}": value for rest, value in by_number[number].items()}
    skipped = (names[number] for number in sorted(by_number) if names[number] not in used)
    report = FitReport("IP-Adapter", tuple(used), tuple(skipped))
    return {**parts, "ip_adapter": fitted}, report


def _nested(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping; got {type(state_dict).__name__}")
    check_names("state_dict", state_dict)
    parts = dict(state_dict)
    if not parts.keys() & set(_PARTS):
        split = {key: key.partition(".") for key in state_dict}
        parts = {part: {} for part in dict.fromkeys(head for head, _, _ in split.values())}
        for key, (head, _, rest) in split.items():
            parts[head][rest] = state_dict[key]
    if not set(_PARTS) <= parts.keys():
        raise ValueError(
            f"state_dict: expected the parts of an IP-Adapter, {' and '.join(_PARTS)}; got {', '.join(list(parts)[:4])}"
        )
    for part in _PARTS:
        check_tensors(part, parts[part])
    return parts


def _by_number(weights: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in weights.items():
        number, _, rest = key.partition(".")
        if not number.isdecimal() or not rest or int(number) >= len(names):
            raise ValueError(
                f"ip_adapter: expected names that begin with the number of one of the {len(names)} attention modules "
                f"of the full model that this U-Net was made from; got {key!r}"
            )
        found.setdefault(int(number), {})[rest] = value
    return found


def _check(by_number: Mapping[int, Mapping[str, Tensor]], known: Origin) -> None:
    names = attentions_of(known.full)
    for number in range(1, len(names), 2):
        layer = known.full.get_submodule(names[number])
        for name in ("to_k", "to_v"):
            value = by_number.get(number, {}).get(f"{name}_ip.weight")
            expected = tuple(getattr(layer, name).weight.shape)
            given = None if value is None else tuple(value.shape)
            if given != expected:
                raise ValueError(
                    f"ip_adapter: expected {number}.{name}_ip.weight of the shape {expected}, for {names[number]} of "
                    f"the full model that this U-Net was made from; got {'none' if given is None else given}"
                )
