"""LoRA that was trained on the full model, for a pruned U-Net."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fastsd.adapters.origin import Origin, origin_of
from fastsd.adapters.report import FitReport
from fastsd.adapters.state import check_tensors
from fastsd.compress.compression import Compression

_UNET = "unet."
_KOHYA = "lora_unet_"
_KOHYA_TEXT = ("lora_te_", "lora_te1_", "lora_te2_")
# kohya's names of the layers of a residual block of SDXL
_SGM_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_SGM = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
# what a file may have for a layer; the two matrices first
_PEFT_PARTS = (
    *(".lora_A.weight", ".lora_B.weight", ".lora_B.bias"),
    *(".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
)
_KOHYA_PARTS = (".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale")
# with old names: diffusers takes them and does not look at them
_UNREAD = ("_lora.alpha", ".lora.alpha")


def fit_lora(
    state_dict: Mapping[str, Tensor], unet: Any, *, origin: Compression | None = None
) -> tuple[dict[str, Tensor], FitReport]:
    """Rename the layers of a LoRA as a pruned U-Net has them, and leave out those that it does not have.

    The result is loaded as the LoRA would be: by ``pipe.load_lora_weights(result)``, or
    ``pipe.unet.load_lora_adapter(result)`` for names that PEFT or diffusers give.

    Args:
        state_dict: as a file holds it, with the names of PEFT or diffusers, with or without ``"unet."`` before them,
            or those of kohya. What belongs to text encoders stays as it is. No tensor is copied, but those of the
            U-Net that a kohya file has an alpha for: it goes into them.
        unet: the U-Net that the LoRA is for; a full one takes all of it.
        origin: see :func:`fastsd.adapters.origin_of`.

    Returns:
        The LoRA for this U-Net, with names of the same kind, and what was used and skipped.

    Raises:
        TypeError, ValueError: see :func:`fastsd.adapters.origin_of`.
        TypeError: ``state_dict`` does not map names to tensors.
        ValueError: a layer that the full model does not have, or has with another shape: the LoRA is not for it; or
            what a layer has is no LoRA (one matrix, two of different rank, LoHa, LoKr).

    A LoRA's strength that stands in the metadata of its file (``lora_alpha`` of PEFT) is not in a ``state_dict``: pass
    the metadata on, or scale by ``set_adapters``.
    """
    known = origin_of(unet, origin)
    check_tensors("state_dict", state_dict)
    places = _places(unet, known)
    is_kohya = any(key.startswith(_KOHYA) for key in state_dict)
    is_kohya = is_kohya or all(key.startswith(_KOHYA_TEXT) for key in state_dict)
    found = list(_of_kohya(state_dict, known) if is_kohya else _of_peft(state_dict, known))
    _check(state_dict, found, known, _KOHYA_PARTS if is_kohya else _PEFT_PARTS)
    values = _with_alpha(state_dict) if is_kohya else state_dict
    fitted: dict[str, Tensor] = {}
    used: dict[str, None] = {}
    skipped: dict[str, None] = {}
    for key, prefix, path, rest in found:
        if path is None:
            fitted[key] = values[key]
            continue
        place = places.get(path)
        if place is None:
            skipped[path] = None
            continue
        used[path] = None
        if key in values:
            fitted[prefix + (place.replace(".", "_") if is_kohya else place) + rest] = values[key]
    return fitted, FitReport("LoRA", tuple(used), tuple(skipped))


# a key, what stands before and behind the layer's name, and that; None where it is no layer of a U-Net
_Entry = tuple[str, str, str | None, str]


def _places(unet: Any, known: Origin) -> dict[str, str]:
    """Where the layers of the full model are in the U-Net."""
    from fastsd.nn.cond_conv import CondConv2d

    unet = getattr(unet, "_orig_mod", unet)
    return {
        known.source_of(path): path
        for path, module in unet.named_modules()
        # it mixes kernels for each sample: not what PEFT can add to
        if not isinstance(module, CondConv2d)
    }


def _of_peft(state_dict: Mapping[str, Tensor], known: Origin) -> Iterator[_Entry]:
    from diffusers.utils import convert_unet_state_dict_to_peft

    leaves = _leaves(known.full)
    prefix = _UNET if any(key.startswith(_UNET) for key in state_dict) else ""
    for key, value in state_dict.items():
        if not key.startswith(prefix) or (not prefix and key.startswith("text_encoder")):
            yield key, "", None, ""
            continue
        if key.endswith(_UNREAD):
            continue
        name = key.removeprefix(prefix)
        if ".lora_A" not in name and ".lora_B" not in name:
            name = next(iter(convert_unet_state_dict_to_peft({name: value})))
        parts = name.split(".")
        path = next((p for end in range(len(parts), 0, -1) if (p := ".".join(parts[:end])) in leaves), None)
        if path is None or path == name:
            raise ValueError(
                f"state_dict: expected layers of the full model that this U-Net was made from; it has none for {key!r}"
            )
        yield key, prefix, path, name[len(path) :]


def _of_kohya(state_dict: Mapping[str, Tensor], known: Origin) -> Iterator[_Entry]:
    names = {path.replace(".", "_"): path for path in _leaves(known.full)}
    names |= {_sgm_name(path, known.full): path for path in _leaves(known.full)}
    for key in state_dict:
        if key.startswith(_KOHYA_TEXT):
            yield key, "", None, ""
            continue
        name, _, rest = key.removeprefix(_KOHYA).partition(".")
        path = names.get(name)
        if path is None or not key.startswith(_KOHYA):
            raise ValueError(
                f"state_dict: expected kohya's names of layers of the full model that this U-Net was made from; it "
                f"has none for {key!r}"
            )
        yield key, _KOHYA, path, "." + rest


def _with_alpha(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every alpha of the U-Net's layers in their weights.

    diffusers gives the most frequent alpha to layers of which it loses track, and which that is changes when layers are
    left out.
    """
    scaled = dict(state_dict)
    for key in state_dict:
        layer = key.removesuffix(".alpha")
        down, up = f"{layer}.lora_down.weight", f"{layer}.lora_up.weight"
        if not key.startswith(_KOHYA) or layer == key:
            continue
        scale = float(scaled.pop(key)) / scaled[down].shape[0]
        # half of it to each, as a power of two, so that small ones do not get lost in fp16
        half = 2.0 ** round(math.log2(scale) / 2) if scale > 0 else 1.0
        scaled[down], scaled[up] = scaled[down] * half, scaled[up] * (scale / half)
    return scaled


def _sgm_name(path: str, full: Any) -> str:
    """The name that Stability's code, which kohya trains SDXL on, has for a layer; its parts joined by ``_``."""
    if path in _SGM:
        return _SGM[path]
    layers = full.config.layers_per_block
    parts = path.split(".")
    kind = parts[1] if parts[0] == "mid_block" else parts[2] if len(parts) > 3 else ""
    if kind not in ("resnets", "attentions", "downsamplers", "upsamplers"):
        return path.replace(".", "_")
    if parts[0] == "mid_block":
        place, layer, rest = "middle_block", int(parts[2]), parts[3:]
        where = f"{place}_{2 * layer if kind == 'resnets' else 1}"
    else:
        block, layer, rest = int(parts[1]), int(parts[3]), parts[4:]
        if parts[0] == "down_blocks":
            number = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else layer)
            where = f"input_blocks_{number}_{int(kind == 'attentions')}"
        else:
            number = block * (layers + 1) + (layers if kind == "upsamplers" else layer)
            behind = 1 + hasattr(full.up_blocks[block], "attentions") if kind == "upsamplers" else kind == "attentions"
            where = f"output_blocks_{number}_{int(behind)}"
    if kind == "resnets":
        rest = [_SGM_RESNET.get(rest[0], rest[0]), *rest[1:]]
    elif kind == "downsamplers":
        rest = ["op"]
    return "_".join([where, *rest])


def _leaves(full: nn.Module) -> set[str]:
    return {path for path, module in full.named_modules() if next(module.children(), None) is None}


def _check(state_dict: Mapping[str, Tensor], found: Iterable[_Entry], known: Origin, parts: tuple[str, ...]) -> None:
    """For each layer there are two matrices of one rank that suit it, and nothing that a LoRA has not."""
    down, up = parts[:2]
    layers: dict[str, dict[str, str]] = {}
    for key, _, path, rest in found:
        if path is None:
            continue
        if rest not in parts:
            names = ", ".join(part[1:] for part in parts)
            raise ValueError(f"state_dict: expected what a LoRA has for a layer, {names}; got {key!r}")
        if rest == ".alpha":
            _check_alpha(key, state_dict[key])
        elif rest in (down, up):
            _check_shape(key, state_dict[key], known.full.get_submodule(path), 1 if rest == down else 0)
        layers.setdefault(path, {})[rest] = key
    for path, keys in layers.items():
        if down not in keys or up not in keys:
            raise ValueError(
                f"state_dict: expected two matrices, {down[1:]} and {up[1:]}, for {path}; got "
                f"{', '.join(map(repr, keys.values()))}"
            )
        ranks = state_dict[keys[down]].shape[0], state_dict[keys[up]].shape[1]
        if ranks[0] != ranks[1] or 0 in ranks:
            raise ValueError(
                f"state_dict: expected the two matrices for {path} to be of one rank, of at least 1; got {ranks[0]} "
                f"and {ranks[1]}"
            )


def _check_alpha(key: str, value: Tensor) -> None:
    if value.numel() != 1 or not math.isfinite(value):
        given = f"the shape {tuple(value.shape)}" if value.numel() != 1 else float(value)
        raise ValueError(f"state_dict: expected one finite number for {key!r}; got {given}")


def _check_shape(key: str, value: Tensor, layer: nn.Module, dimension: int) -> None:
    """A matrix has as many inputs or outputs as the layer."""
    if value.ndim < 2:
        raise ValueError(f"state_dict: expected two dimensions or more for {key!r}; got the shape {tuple(value.shape)}")
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return
    if value.shape[dimension] != weight.shape[dimension]:
        raise ValueError(
            f"state_dict: expected {weight.shape[dimension]} {('outputs', 'inputs')[dimension]} for {key!r}, as the "
            f"full model has that this U-Net was made from; got {value.shape[dimension]}"
        )
