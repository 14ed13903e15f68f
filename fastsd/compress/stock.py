"""Stock U-Nets in folders: whether the files are what they say, and each weight as it was saved."""

import json
from pathlib import Path
from typing import Any

import torch

from fastsd.compress.configuration import arguments_of, check_config
from fastsd.compress.files import CheckpointError, Shape, check_dtype, give_weights, read_json, shapes_in, shapes_of
from fastsd.compress.plan import PlanError

CONFIG_FILE = "config.json"
_WEIGHTS = "diffusion_pytorch_model"
_WEIGHTS_FILE = f"{_WEIGHTS}.safetensors"
_INDEX_FILE = f"{_WEIGHTS_FILE}.index.json"
_CLASS = "UNet2DConditionModel"


def stock_files(folder: Path) -> list[str]:
    """The names of what diffusers has written into a folder: configuration and weights of any kind."""
    config = [CONFIG_FILE] if (folder / CONFIG_FILE).is_file() else []
    return config + sorted(path.name for path in folder.glob(f"{_WEIGHTS}*"))


def check_stock(folder: Path) -> None:
    """A stock U-Net's configuration and weights speak of the same model; of other models nothing is known here.

    diffusers gives random weights to what a file lacks, with no more than a warning: a pruned model's folder that has
    the configuration of the full one loads, and draws noise.

    Raises:
        CheckpointError: they do not, or cannot be read; the message says what to do.
    """
    config = _config_in(folder)
    if config.get("_class_name") == _CLASS:
        _checked(folder, config)


def load_stock(folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Any:
    """The stock U-Net in a folder; ``dtype``: what its weights are cast to, ``None`` for nothing.

    Raises:
        CheckpointError: as :func:`check_stock`, or it is another model.
    """
    check_dtype(dtype)
    config = _config_in(folder)
    name = config.get("_class_name")
    if name != _CLASS:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: expected the configuration of a {_CLASS}; got that of {name!r}, which diffusers "
            "loads"
        )
    model, files = _checked(folder, config)
    model.register_to_config(_name_or_path=str(folder))  # as diffusers does
    return give_weights(model, files, dtype, device, arguments_of(model.config))


def _config_in(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG_FILE, "a configuration")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE}: expected an object; got {type(config).__name__}")
    return config


def _checked(folder: Path, config: dict[str, Any]) -> tuple[Any, list[Path]]:
    """The model without weights (on ``meta``), and the files that hold exactly these."""
    from diffusers import UNet2DConditionModel

    files, given = _weights_in(folder)
    try:
        check_config(arguments_of(config))
        with torch.device("meta"):
            model: Any = UNet2DConditionModel.from_config(config)
    except Exception as error:  # what diffusers says of a configuration that it cannot build
        raise CheckpointError(f"{folder / CONFIG_FILE}: expected a {_CLASS} that can be built: {error}") from error
    expected = shapes_of(model.state_dict())
    if given == expected:
        return model, files
    names = sorted(name for name in given.keys() | expected.keys() if given.get(name) != expected.get(name))
    changes = _recipe_of(given, arguments_of(model.config))
    advice = changes or "take the config.json that was saved with these weights"
    raise CheckpointError(
        f"{folder}: expected weights of the model that config.json describes; {len(names)} differ, the first is "
        f"{names[0]}: {expected.get(names[0], 'absent')} by config.json, {given.get(names[0], 'absent')} in the file; "
        f"{advice}"
    )


def _weights_in(folder: Path) -> tuple[list[Path], dict[str, Shape]]:
    """The files that diffusers loads, those of an index before a single one, and the shapes in them."""
    index, single = folder / _INDEX_FILE, folder / _WEIGHTS_FILE
    if not index.is_file():
        if not single.is_file():
            others = ", ".join(name for name in stock_files(folder) if name != CONFIG_FILE) or "no weights"
            raise CheckpointError(f"{folder}: expected {_WEIGHTS_FILE} or {_INDEX_FILE}; there is {others}")
        return [single], shapes_in(single)
    data = read_json(index, "an index of weights")
    places = data.get("weight_map") if isinstance(data, dict) and isinstance(data.get("metadata"), dict) else None
    if not isinstance(places, dict) or not all(_is_file_name(place) for place in places.values()):
        raise CheckpointError(
            f"{index}: expected metadata and a weight_map from tensors to files beside it; got others"
        )
    files = [folder / place for place in sorted(set(places.values()))]
    shapes: dict[str, Shape] = {}
    found: dict[str, str] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: expected the weights that {_INDEX_FILE} names; there is no such file")
        shapes |= (here := shapes_in(file))
        found |= dict.fromkeys(here, file.name)
    for name in sorted(places.keys() | found.keys()):
        if places.get(name) != found.get(name):
            raise CheckpointError(
                f"{index}: expected the file of each tensor; {name} is in {found.get(name, 'none')}, and by the index "
                f"in {places.get(name, 'none')}"
            )
    return files, shapes


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _recipe_of(given: dict[str, Shape], config: dict[str, Any]) -> str | None:
    """What to change in the configuration of a full model whose weights are those of a recipe, as a sentence."""
    from fastsd.compress.model import build
    from fastsd.compress.recipes import RECIPES, recipe

    for name in RECIPES:
        try:
            model, structure = build(config, recipe(name, config))
        except PlanError:
            continue
        if structure.is_stock and shapes_of(model.state_dict()) == given:
            changes = {
                key: value for key, value in structure.config.items() if _plain(config.get(key)) != _plain(value)
            }
            return f"the weights are those of {name}: write {json.dumps(changes)} into config.json"
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
