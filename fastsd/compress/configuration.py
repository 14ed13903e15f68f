"""Configurations of stock U-Nets: what diffusers builds them with, and what a file may ask for."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from fastsd.compress.plan import PlanError

Config = Mapping[str, Any]
# a hostile file should not make thousands of layers
LARGEST_NUMBER, LONGEST_LIST, MOST_LAYERS = 1 << 20, 32, 128


@functools.cache
def _arguments() -> frozenset[str]:
    from diffusers import UNet2DConditionModel

    return frozenset(inspect.signature(UNet2DConditionModel.__init__).parameters) - {"self"}


def arguments_of(config: Config) -> dict[str, Any]:
    """What a model with this configuration is built with: without the entries that diffusers adds for itself."""
    return {key: value for key, value in config.items() if key in _arguments()}


def unknown_entries_of(config: Config) -> dict[str, Any]:
    """What somebody has written into a configuration besides; diffusers keeps such entries, and passes over them."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in _arguments()}


def check_config(config: Any) -> None:
    """``config``, read from a file, names arguments of a U-Net, of a reasonable size.

    Raises:
        PlanError: it does not.
    """
    if not isinstance(config, dict) or not set(config) <= _arguments():
        other = sorted(set(config) - _arguments()) if isinstance(config, dict) else [type(config).__name__]
        raise PlanError(f"base_config: expected arguments of UNet2DConditionModel; got {', '.join(map(str, other))}")
    for key, value in config.items():
        few = not key.endswith("layers_per_block") or _layers_are_few(value)
        if not _is_small(value, 0) or not few:
            raise PlanError(f"base_config: expected numbers, names and short lists; got {key}={value!r:.80}")


def _is_small(value: Any, depth: int) -> bool:
    if isinstance(value, list | tuple):
        return depth < 3 and len(value) <= LONGEST_LIST and all(_is_small(item, depth + 1) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return abs(value) <= LARGEST_NUMBER
    return value is None or isinstance(value, bool) or (isinstance(value, str) and len(value) <= 256)


def _layers_are_few(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_layers_are_few, value))
    return value is None or (isinstance(value, int) and value <= MOST_LAYERS)
