"""What a recorded forward takes for granted of its model, and whether that is still so.

A CUDA graph holds kernels and addresses. It sees what is written into a weight, but neither that a weight has moved
nor that Python would decide otherwise by now: for another LoRA, scale of an adapter or attention processor.
"""

import functools
import types
from collections import deque
from collections.abc import Collection
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from fastsd.nn.plain import PLAIN, is_method_of
from fastsd.nn.replacement import SETTINGS

GRAPHS = "_fastsd_graphs"  # where a model's graphs stand
PLAIN_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format)
_OPAQUE = (*PLAIN_VALUES, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
# what only saving, loading, gradients and fastsd itself read
_UNREAD = {
    GRAPHS,
    SETTINGS,
    "_backward_hooks",
    "_backward_pre_hooks",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
}
# what is put on a model runs around its forward, not in it
_AROUND_A_FORWARD = {
    "_diffusers_hook",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_hf_hook",
    "_old_forward",
    "forward",
}


class Frozen:
    """A model as it is now: its modules, their attributes, and where its tensors lie.

    Attributes:
        refusal: why a recorded forward would not do what the model's own does, as a sentence; ``None`` where it would.
        tensors: parameters, buffers and all other tensors that modules hold.
        devices: where these are.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._look()

    def _look(self) -> None:
        self.refusal: str | None = None
        self.tensors: list[Tensor] = []
        self._modules: list[nn.Module] = []
        self._methods: dict[type, list[Any]] = {}
        self._paths: list[str] = []
        self._live: list[Collection[Any]] = []
        self._walk()
        self._values = [tuple(live) for live in self._live]
        self._flat = list(chain.from_iterable(self._values))
        self._types = list(map(type, self._modules))
        self._places = self._where()
        self.devices = sorted({tensor.device for tensor in self.tensors}, key=str)

    def change(self) -> str | None:
        """What is different by now, by its path; ``None`` where nothing is."""
        # all in C where nothing has changed: a model has some thousand of these
        flat = list(chain.from_iterable(self._live))
        if len(flat) != len(self._flat) or not all(map(is_, flat, self._flat)):
            for path, live, values in zip(self._paths, self._live, self._values, strict=True):
                if len(live) != len(values) or not all(map(_is_same, live, values)):
                    return path or "the model itself"
            self._look()  # what is equal may be another object by now
        if list(map(type, self._modules)) != self._types:
            return "the class of a module"
        if any(_methods(cls) != methods for cls, methods in self._methods.items()):
            return "a method of a class"
        return "the place of a tensor" if self._where() != self._places else None

    def _where(self) -> list[Any]:
        return [(t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) for t in self.tensors]

    def _walk(self) -> None:
        seen: set[int] = set()
        left: list[tuple[str, Any]] = [("", self._root)]
        while left:
            path, found = left.pop()
            if isinstance(found, _OPAQUE) or id(found) in seen:
                continue
            seen.add(id(found))
            if isinstance(found, Tensor):
                self._add_tensor(path, found)
            elif isinstance(found, _CONTAINERS):
                left += self._add_container(path, found)
            elif not isinstance(found, functools.partial) and hasattr(found, "__dict__"):
                left += self._add_object(path, found, is_root=found is self._root)

    def _add_tensor(self, path: str, tensor: Tensor) -> None:
        if type(tensor) not in PLAIN or tensor.layout is not torch.strided:
            self._refuse(f"{path} is a {type(tensor).__qualname__} of layout {tensor.layout}, expected a plain tensor")
        else:
            self.tensors.append(tensor)

    def _add_container(self, path: str, found: Any) -> list[tuple[str, Any]]:
        if not isinstance(found, dict):
            self._add(path, found)
            return [(f"{path}.{index}", value) for index, value in enumerate(found)]
        self._add(path, found.keys())
        self._add(path, found.values())
        return [(f"{path}.{name}", value) for name, value in found.items()]

    def _add_object(self, path: str, found: Any, *, is_root: bool) -> list[tuple[str, Any]]:
        attributes = vars(found)
        self._methods.setdefault(type(found), _methods(type(found)))
        self._add(path, attributes.values())
        if not isinstance(found, nn.Module):
            return [(f"{path}.{name}", value) for name, value in attributes.items()]
        self._modules.append(found)
        if not is_root:
            self._refuse(_why_python_runs(path, found))
        skipped = _UNREAD | _AROUND_A_FORWARD if is_root else _UNREAD
        prefix = f"{path}." if path else ""
        inside = []
        for name, value in attributes.items():
            if name in ("_modules", "_parameters", "_buffers"):
                self._add(path, value.values())
                inside += [(f"{prefix}{child}", module) for child, module in value.items()]
            elif name not in skipped:
                inside.append((f"{prefix}{name}", value))
        return inside

    def _add(self, path: str, live: Collection[Any]) -> None:
        self._paths.append(path)
        self._live.append(live)

    def _refuse(self, reason: str | None) -> None:
        if self.refusal is None:
            self.refusal = reason


def _why_python_runs(path: str, module: nn.Module) -> str | None:
    """Why a module has to be called from Python every time, as a sentence, or ``None``."""
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{path} has a forward hook, which a graph would run only once"
    forward = vars(module).get("forward")
    if forward is not None and not is_method_of(forward, module, type(module)):
        return f"{path} has an instance forward (an offloading or casting hook?), which a graph would run only once"
    if getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules:
        return f"{path} is compiled"
    return None


def _methods(cls: type) -> list[Any]:
    """What somebody may put another function in the place of."""
    return [getattr(cls, name, None) for name in ("forward", "__call__")]


def _is_same(now: Any, then: Any) -> bool:
    """Whether a value is what it was; containers may be others that hold the same."""
    if now is then:
        return True
    if type(now) is not type(then):
        return False
    if isinstance(now, dict):
        return list(now) == list(then) and all(map(_is_same, now.values(), then.values()))
    if isinstance(now, list | tuple):
        return len(now) == len(then) and all(map(_is_same, now, then))
    return isinstance(now, PLAIN_VALUES) and now == then
