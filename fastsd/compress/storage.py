"""Compressed models in folders: a plan as JSON beside safetensors; and whether a stock folder is what it says."""

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsd.compress.plan import Plan, PlanError
from fastsd.compress.structure import arguments_of

PLAN_FILE = "fastsd_plan.json"
WEIGHTS_FILE = "fastsd_model.safetensors"
_FORMAT = "fastsd compressed U-Net, version 1"
_KEYS = ("format", "base_config", "plan", "weights_sha256", "sha256")
_LARGEST_FILE = 1 << 20  # bytes of a plan
Shape = tuple[int, ...]
# what a configuration may ask for; a hostile one should not make thousands of layers
_LARGEST_NUMBER, _LONGEST_LIST, _MOST_LAYERS = 1 << 20, 32, 128


class CheckpointError(ValueError):
    """A folder that is not what it should be; the message says what was expected and what was found."""


def save(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write a compressed model into a folder: :data:`WEIGHTS_FILE`, then :data:`PLAN_FILE`.

    Raises:
        CheckpointError: the model's weights are not those of its plan.
    """
    from safetensors.torch import save_file

    compression = model.compression
    state = model.state_dict()
    _compare(_shapes(state), _expected(compression), "the model")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    weights = path / WEIGHTS_FILE
    with _replacing(weights) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, temporary)
    data = {
        "format": _FORMAT,
        "base_config": compression.base_config,
        "plan": compression.plan.to_dict(),
        "weights_sha256": _digest_of_file(weights),
    }
    with _replacing(path / PLAN_FILE) as temporary:
        Path(temporary).write_text(json.dumps(data | {"sha256": _digest(data)}, indent=1))


def is_compressed(folder: Path) -> bool:
    """Whether :func:`save` has written the folder."""
    return (folder / PLAN_FILE).is_file()


def load(
    folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Any:
    """The U-Net in a folder: one that :func:`fastsd.compress` has made and ``save_pretrained`` has written, or stock.

    Args:
        folder: written by ``save_pretrained``; nothing is looked for on a hub. ``fastsd_plan.json`` and
            ``fastsd_model.safetensors`` of a compressed model, ``config.json`` and safetensors of a stock one.
        dtype: what the weights are cast to; ``None`` for that in which they were saved.
        device: where to.

    Returns:
        The model, in evaluation mode, bitwise as it was saved.

    Raises:
        CheckpointError: a file is missing, cut off, changed since it was written, or does not fit the others. Then
            nothing is loaded.
    """
    from fastsd import models

    path = Path(folder).expanduser()
    if is_compressed(path):
        return load_compressed(path, dtype, device)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: expected a folder with {PLAN_FILE} or config.json; there is neither")
    return models.load(str(path), dtype or _saved_dtype(path), device)


def _saved_dtype(folder: Path) -> torch.dtype:
    from safetensors import SafetensorError, safe_open

    for weights in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(weights, framework="pt") as file:
                return next((file.get_tensor(name).dtype for name in file.keys()), torch.float32)  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{weights}: expected a safetensors file; it cannot be read: {error}") from error
    return torch.float32


def check_stock(folder: Path) -> None:
    """A stock U-Net's configuration and weights speak of the same model.

    diffusers gives random weights to what a file lacks, with no more than a warning: a pruned model's folder that has
    the configuration of the full one loads, and draws noise.

    Raises:
        CheckpointError: they do not; the message says what to do.
    """
    from diffusers import UNet2DConditionModel
    from safetensors import SafetensorError

    config = json.loads((folder / "config.json").read_text())
    files = [folder / "diffusion_pytorch_model.safetensors"]
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if not files[0].is_file() and index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if config.get("_class_name") != UNet2DConditionModel.__name__ or not all(file.is_file() for file in files):
        return  # nothing that is known here; diffusers says what it lacks
    try:
        given = {name: shape for file in files for name, shape in _header(file).items()}
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: expected safetensors files; one cannot be read: {error}") from error
    with torch.device("meta"):
        model: Any = UNet2DConditionModel.from_config(config)
    expected = _shapes(model.state_dict())
    if given == expected:
        return
    names = sorted(name for name in given.keys() | expected.keys() if given.get(name) != expected.get(name))
    changes = _recipe_of(given, arguments_of(model.config))
    advice = changes or "take the config.json that was saved with these weights"
    raise CheckpointError(
        f"{folder}: expected weights of the model that config.json describes; {len(names)} differ, the first is "
        f"{names[0]}: {expected.get(names[0], 'absent')} by config.json, {given.get(names[0], 'absent')} in the file; "
        f"{advice}"
    )


def _recipe_of(given: dict[str, Shape], config: dict[str, Any]) -> str | None:
    """What to change in the configuration of a full model whose weights are those of a recipe, as a sentence."""
    from fastsd.compress.model import build
    from fastsd.compress.recipes import RECIPES, recipe

    for name in RECIPES:
        try:
            model, structure = build(config, recipe(name, config))
        except PlanError:
            continue
        if structure.is_stock and _shapes(model.state_dict()) == given:
            changes = {
                key: value for key, value in structure.config.items() if _plain(config.get(key)) != _plain(value)
            }
            return f"the weights are those of {name}: write {json.dumps(changes)} into config.json"
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def load_compressed(
    folder: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Any:
    """The model that :func:`save` has written; ``dtype``: what its weights are cast to, ``None`` for nothing.

    Raises:
        CheckpointError: a file is missing, cut off, changed since it was written, or does not fit the other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from fastsd.compress.model import build

    path = Path(folder)
    base_config, plan, weights_digest = _read_plan(path / PLAN_FILE)
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        raise CheckpointError(f"{weights}: expected the weights of {PLAN_FILE}; there is no such file")
    try:
        model, structure = build(base_config, plan)
    except Exception as error:  # what diffusers says of a configuration that it cannot build
        raise CheckpointError(f"{path / PLAN_FILE}: expected a configuration and a plan that suit: {error}") from error
    try:
        _compare(_header(weights), _shapes(model.state_dict()), str(weights))
        if _digest_of_file(weights) != weights_digest:
            raise CheckpointError(
                f"{weights}: expected the file that was written with {PLAN_FILE}; it has changed since"
            )
        state = load_file(weights, device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights}: expected a safetensors file; it cannot be read: {error}") from error
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    _fill_unsaved(model, base_config, structure, device)
    return model.eval()


def _read_plan(path: Path) -> tuple[dict[str, Any], Plan, str]:
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise CheckpointError(f"{path}: expected at most {_LARGEST_FILE} bytes; got {size}")
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a plan as JSON; it cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(f"{path}: expected the format {_FORMAT!r}; got {found!r}")
    if set(data) != set(_KEYS):
        raise CheckpointError(f"{path}: expected the keys {', '.join(_KEYS)}; got {', '.join(map(str, data))}")
    digest = data.pop("sha256")
    if digest != _digest(data):
        raise CheckpointError(f"{path}: expected the file as it was written; it has changed since")
    try:
        _check_config(data["base_config"])
        return data["base_config"], Plan.from_dict(data["plan"]), data["weights_sha256"]
    except PlanError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_config(config: Any) -> None:
    from diffusers import UNet2DConditionModel

    known = set(inspect.signature(UNet2DConditionModel.__init__).parameters) - {"self"}
    if not isinstance(config, dict) or not set(config) <= known:
        other = sorted(set(config) - known) if isinstance(config, dict) else [type(config).__name__]
        raise PlanError(f"base_config: expected arguments of UNet2DConditionModel; got {', '.join(map(str, other))}")

    def is_small(value: Any, depth: int) -> bool:
        if isinstance(value, list):
            return depth < 3 and len(value) <= _LONGEST_LIST and all(is_small(item, depth + 1) for item in value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return abs(value) <= _LARGEST_NUMBER
        return value is None or isinstance(value, bool) or (isinstance(value, str) and len(value) <= 256)

    def layers_are_few(value: Any) -> bool:
        return all(map(layers_are_few, value)) if isinstance(value, list) else (value or 0) <= _MOST_LAYERS

    for key, value in config.items():
        few = not key.endswith("layers_per_block") or layers_are_few(value)
        if not is_small(value, 0) or not few:
            raise PlanError(f"base_config: expected numbers, names and short lists; got {key}={value!r:.80}")


def _expected(compression: Any) -> dict[str, Shape]:
    from fastsd.compress.model import build

    model, _ = build(compression.base_config, compression.plan)
    return _shapes(model.state_dict())


def _fill_unsaved(model: Any, base_config: dict[str, Any], structure: Any, device: torch.device | str) -> None:
    """Buffers that are not in a state_dict depend on the configuration alone."""
    missing = [name for name, buffer in model.named_buffers() if buffer.device.type == "meta"]
    if missing:
        from diffusers import UNet2DConditionModel

        stock: Any = UNet2DConditionModel(**base_config)
        for name in missing:
            place, _, key = name.rpartition(".")
            buffer = stock.get_buffer(structure.source_of(name)).to(device)
            model.get_submodule(place).register_buffer(key, buffer, persistent=False)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _header(weights: Path) -> dict[str, Shape]:
    """The shape of every tensor of a safetensors file, whose data are not read."""
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping


def _compare(given: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> None:
    for name in sorted(given.keys() | expected.keys()):
        if given.get(name) != expected.get(name):
            raise CheckpointError(
                f"{what}: expected the weights of its plan; {name} should be {expected.get(name, 'absent')}, and is "
                f"{given.get(name, 'absent')}"
            )


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _replacing:
    """A temporary file beside ``path``, which takes its place at the end, or vanishes where something fails."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> str:
        handle, self.temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        os.close(handle)
        return self.temporary

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(self.temporary, 0o666 & ~umask)
            os.replace(self.temporary, self.path)
        else:
            os.unlink(self.temporary)
