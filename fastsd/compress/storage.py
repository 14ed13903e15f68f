"""Compressed models in folders: a plan as JSON beside safetensors."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsd.compress.compression import Compression
from fastsd.compress.files import (
    CheckpointError,
    Shape,
    check_dtype,
    give_weights,
    read_json,
    replacing,
    shapes_in,
    shapes_of,
)
from fastsd.compress.plan import PlanError
from fastsd.compress.stock import CONFIG_FILE, load_stock, stock_files

PLAN_FILE = "fastsd_plan.json"
WEIGHTS_FILE = "fastsd_model.safetensors"
_FORMAT = "fastsd compressed U-Net, version 1"
_COMPRESSION = ("base_config", "plan", "before")
_KEYS = ("format", *_COMPRESSION, "weights_sha256", "sha256")


def save(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write a compressed model into a folder: :data:`WEIGHTS_FILE` and :data:`PLAN_FILE`.

    What was there stays until both are written; nothing is written beside a stock model.

    Raises:
        CheckpointError: the model's weights are not those of its plan, or the folder holds a stock model.
    """
    from safetensors.torch import save_file

    compression = getattr(model, "compression", None)
    if compression is None:
        raise CheckpointError("the model: expected one that fastsd.compress has made; got one that has no plan")
    state = model.state_dict()
    _compare(shapes_of(state), _expected(compression), "the model")
    _check_untied(state)
    path = Path(folder)
    stock = stock_files(path)
    if stock:
        raise CheckpointError(
            f"{path}: expected no stock model in the folder of a compressed one, as which stock diffusers would load "
            f"it; got {', '.join(stock)}: remove them, or save elsewhere"
        )
    path.mkdir(parents=True, exist_ok=True)
    # the weights go into place first, and no plan fits others
    with replacing(path / PLAN_FILE) as plan, replacing(path / WEIGHTS_FILE) as weights:
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, weights)
        data = {"format": _FORMAT, **compression.to_dict(), "weights_sha256": _digest_of_file(weights)}
        plan.write_text(json.dumps(data | {"sha256": _digest(data)}, indent=1), "utf-8")


def is_compressed(folder: Path) -> bool:
    """Whether :func:`save` has written into the folder."""
    return (folder / PLAN_FILE).is_file()


def load(
    folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Any:
    """The U-Net in a folder: one that :func:`fastsd.compress` has made and ``save_pretrained`` has written, or stock.

    Args:
        folder: written by ``save_pretrained``; nothing is looked for on a hub. ``fastsd_plan.json`` and
            ``fastsd_model.safetensors`` of a compressed model, ``config.json`` and safetensors, without a variant, of a
            stock ``UNet2DConditionModel``.
        dtype: what the weights are cast to; ``None`` leaves each in that in which it was saved.
        device: where to.

    Returns:
        The model, in evaluation mode, bitwise as it was saved.

    Raises:
        CheckpointError: a file is missing, cut off, changed since it was written, or does not fit the others; or the
            folder holds a compressed model and a stock one. Then nothing is loaded.
        TypeError: ``dtype`` is no floating-point ``torch.dtype``.
    """
    path = Path(folder).expanduser()
    if is_compressed(path):
        return load_compressed(path, dtype, device)
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(f"{path}: expected a folder with {PLAN_FILE} or {CONFIG_FILE}; there is neither")
    return load_stock(path, dtype, device)


def load_compressed(
    folder: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Any:
    """The model that :func:`save` has written; ``dtype``: what its weights are cast to, ``None`` for nothing.

    Raises:
        CheckpointError: a file is missing, cut off, changed since it was written, or does not fit the other; or there
            is a stock model.
    """
    from fastsd.compress.model import CompressedUNet2DConditionModel, build

    check_dtype(dtype)
    path = Path(folder)
    _check_kind(path)
    compression, weights_digest = _read_plan(path / PLAN_FILE)
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        raise CheckpointError(f"{weights}: expected the weights of {PLAN_FILE}; there is no such file")
    try:
        model, structure = build(compression.base_config, compression.plan)
    except Exception as error:  # what diffusers says of a configuration that it cannot build
        raise CheckpointError(f"{path / PLAN_FILE}: expected a configuration and a plan that suit: {error}") from error
    _compare(shapes_in(weights), shapes_of(model.state_dict()), str(weights))
    if _digest_of_file(weights) != weights_digest:
        raise CheckpointError(f"{weights}: expected the file that was written with {PLAN_FILE}; it has changed since")
    if isinstance(model, CompressedUNet2DConditionModel):
        model.compression = compression
    return give_weights(model, [weights], dtype, device, compression.base_config, structure.source_of)


def _check_kind(folder: Path) -> None:
    """The folder holds a compressed model, and no other."""
    stock = stock_files(folder)
    if is_compressed(folder):
        if stock:
            raise CheckpointError(
                f"{folder}: expected a compressed model or a stock one; got {PLAN_FILE} of the one and {stock[0]} of "
                "the other: remove the files of that which is not meant"
            )
        return
    if stock:
        found = "it holds a stock model, which fastsd.load or UNet2DConditionModel.from_pretrained loads"
    elif folder.is_dir():
        found = "there is no such file"
    else:
        found = "there is no such folder, and models of a hub are for UNet2DConditionModel.from_pretrained"
    raise CheckpointError(f"{folder}: expected the folder of a compressed model, with {PLAN_FILE}; {found}")


def _read_plan(path: Path) -> tuple[Compression, Any]:
    """What the model was made from, and the digest of its weights."""
    data = read_json(path, "a plan")
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(f"{path}: expected the format {_FORMAT!r}; got {found!r}")
    if set(data) != set(_KEYS):
        raise CheckpointError(f"{path}: expected the keys {', '.join(_KEYS)}; got {', '.join(map(str, data))}")
    digest = data.pop("sha256")
    if digest != _digest(data):
        raise CheckpointError(f"{path}: expected the file as it was written; it has changed since")
    try:
        return Compression.from_dict({key: data[key] for key in _COMPRESSION}), data["weights_sha256"]
    except PlanError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _expected(compression: Compression) -> dict[str, Shape]:
    from fastsd.compress.model import build

    model, _ = build(compression.base_config, compression.plan)
    return shapes_of(model.state_dict())


def _compare(given: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> None:
    for name in sorted(given.keys() | expected.keys()):
        if given.get(name) != expected.get(name):
            raise CheckpointError(
                f"{what}: expected the weights of its plan; {name} should be {expected.get(name, 'absent')}, and is "
                f"{given.get(name, 'absent')}"
            )


def _check_untied(state: Mapping[str, Tensor]) -> None:
    first_at: dict[Any, str] = {}
    for name, value in state.items():
        first = first_at.setdefault((value.device, value.data_ptr()), name)
        if first != name and value.numel():
            raise CheckpointError(f"the model: expected weights of their own; {name} is {first}: give it a copy")


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
