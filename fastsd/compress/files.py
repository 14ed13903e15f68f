"""The files of a model: read with one kind of error, and written whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LARGEST_JSON = 1 << 20  # bytes
Shape = tuple[int, ...]


class CheckpointError(ValueError):
    """A folder that is not what it should be; the message says what was expected and what was found."""


def check_dtype(dtype: Any) -> None:
    """Weights can be cast to ``dtype``, or ``None`` asks for none.

    Raises:
        TypeError: they cannot.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point torch.dtype, or None; got {dtype!r}")


def read_json(path: Path, what: str) -> Any:
    """What a JSON file says; ``what`` it is, for the message.

    Raises:
        CheckpointError: it cannot be read, or is too large.
    """
    try:
        size = path.stat().st_size
        data = json.loads(path.read_text("utf-8")) if size <= _LARGEST_JSON else None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected {what} as JSON; it cannot be read: {error}") from error
    if size > _LARGEST_JSON:
        raise CheckpointError(f"{path}: expected at most {_LARGEST_JSON} bytes; got {size}")
    return data


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The shape of each tensor."""
    return {name: tuple(value.shape) for name, value in state.items()}


def shapes_in(weights: Path) -> dict[str, Shape]:
    """The shape of each tensor of a safetensors file, whose data are not read.

    Raises:
        CheckpointError: the file cannot be read, or holds anything else than floating-point numbers.
    """
    from safetensors import safe_open

    shapes = {}
    with _reading(weights), safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            tensor = file.get_slice(name)
            if not tensor.get_dtype().startswith(("F", "BF")):
                raise CheckpointError(f"{weights}: expected floating-point weights; {name} is {tensor.get_dtype()}")
            shapes[name] = tuple(tensor.get_shape())
    return shapes


def give_weights(
    model: Any,
    files: Iterable[Path],
    dtype: torch.dtype | None,
    device: torch.device | str,
    stock_config: Mapping[str, Any],
    source_of: Callable[[str], str] = str,
) -> Any:
    """``model``, which has none (on ``meta``), with the weights of safetensors files, in evaluation mode.

    Args:
        dtype: what they are cast to; ``None`` leaves each as it was saved.
        stock_config: builds a stock U-Net with the buffers that are not saved; they depend on nothing else.
        source_of: where such a buffer of ``model`` is in that.

    Raises:
        CheckpointError: a file cannot be read.
    """
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for weights in files:
        with _reading(weights):
            state |= load_file(weights, device=str(device))
    model.load_state_dict({name: value.to(dtype or value.dtype) for name, value in state.items()}, assign=True)
    unsaved = [name for name, buffer in model.named_buffers() if buffer.device.type == "meta"]
    if unsaved:
        stock: Any = UNet2DConditionModel(**stock_config)
        for name in unsaved:
            place, _, key = name.rpartition(".")
            buffer = stock.get_buffer(source_of(name)).to(device)
            model.get_submodule(place).register_buffer(key, buffer, persistent=False)
    return model.eval()


@contextlib.contextmanager
def _reading(weights: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights}: expected a safetensors file; it cannot be read: {error}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``, which takes its place at the end, or vanishes where something fails."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise
