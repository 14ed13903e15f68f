"""Modules that share everything with given ones, but for a forward hook."""

import copy
from typing import Any

from torch import nn


def check_unwrapped(name: str, module: Any) -> None:
    """Calls of the module reach its forward hooks, and those of a twin the twin's.

    Raises:
        ValueError: it is compiled, or has a forward of its own.
    """
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        raise ValueError(f"{name}: expected one that is not compiled; fit it first, then compile")
    if "forward" in getattr(module, "__dict__", ()):
        raise ValueError(f"{name}: expected no forward of its own (an offload); fit it first, then offload")


def twin_with(module: nn.Module, hook: Any) -> nn.Module:
    """Another module with the same children, parameters and buffers, and hooks of its own: ``hook``, too.

    It takes the place of one of the same class.
    """
    twin = copy.copy(module)
    for name, value in module.__dict__.items():
        if name in ("_modules", "_parameters", "_buffers") or name.endswith(("_hooks", "_hooks_with_kwargs")):
            twin.__dict__[name] = value.copy()
    for handle, other in list(twin._forward_hooks.items()):
        if isinstance(other, type(hook)):
            del twin._forward_hooks[handle]
    # in front of other hooks, which see what the pipeline gets
    twin.register_forward_hook(hook, prepend=True)
    return twin
