"""What every state dict of an adapter has to be."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_names(name: str, state: Any) -> None:
    """The mapping's keys are strings.

    Raises:
        TypeError: one is not.
    """
    for key in state:
        if not isinstance(key, str):
            raise TypeError(f"{name}: expected names that are strings; got {key!r}")


def check_tensors(name: str, state: Any) -> None:
    """It maps names to tensors.

    Raises:
        TypeError: it does not.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"{name}: expected a mapping from names to tensors; got {type(state).__name__}")
    check_names(name, state)
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor for {key!r}; got {type(value).__name__}")
