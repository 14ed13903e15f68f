"""What a recorded forward takes for granted of its model, and whether that is still so.

A CUDA graph holds kernels and addresses. It sees what is written into a weight, but neither that a weight has moved
nor that Python would decide otherwise by now: for another LoRA, scale of an adapter or attention processor. What a
function of somebody's reads, nobody can tell; so models are served whose code is all of well-known packages.
"""

import copyreg
import enum
import functools
import logging
import numbers
import random
import re
import sys
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from operator import is_
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

from fastsd.nn.plain import PLAIN, is_method_of
from fastsd.nn.replacement import Settings

GRAPHS = "_fastsd_graphs"  # where a model's graphs stand
PLAIN_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format)
_COMPARED = (*PLAIN_VALUES, numbers.Number)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
# what nobody changes, or what changes nothing of a forward
_OPAQUE = (
    *(*PLAIN_VALUES, numbers.Number, enum.Enum, re.Pattern, PurePath, range, slice, torch.layout, types.ModuleType),
    *(types.EllipsisType, types.GenericAlias, types.UnionType, logging.Logger, logging.LoggerAdapter),
    *(weakref.ref, type(threading.Lock()), type(threading.RLock())),
)
# whose functions read nothing that changes from outside of the model
_KNOWN = {"accelerate", "diffusers", "fastsd", "fastsd_kernels", "huggingface_hub", "peft", "torch", "transformers"}
# what only saving, loading, gradients and graphs read, and hooks, of which there may be none
_UNREAD = {
    GRAPHS,
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
}
# what is put on a model runs around its forward, not in it
_AROUND_A_FORWARD = {"_diffusers_hook", "_hf_hook", "_old_forward", "forward"}


class Frozen:
    """A model as it is now: its modules and all that they hold, their classes, and where their tensors lie.

    Attributes:
        refusal: why a recorded forward would not do what the model's own does, as a sentence; ``None`` where it would.
        tensors: parameters, buffers and all other tensors that modules hold.
        devices: where these are.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self.refusal: str | None = None
        self.tensors: list[Tensor] = []
        self._objects: list[Any] = []
        self._classes: set[type] = set()
        self._paths: list[str] = []
        self._live: list[Collection[Any]] = []
        self._hooks: list[Collection[Any]] = []
        self._walk()
        self._sizes = list(map(len, self._live))
        self._flat = list(chain.from_iterable(self._live))
        self._attributes = list(map(vars, self._objects))
        self._types = list(map(type, self._objects))
        self._places = self._where()
        self._is_hooked = any(self._hooks)
        self.devices = sorted({tensor.device for tensor in self.tensors}, key=str)

    def change(self) -> str | None:
        """What is different by now, by its path; ``None`` where nothing is."""
        if self._is_untouched() or self._adopts_equal_values():
            return None
        now = Frozen(self._root)
        change = self._difference(now)
        if change is None:
            vars(self).update(vars(now))  # equal, but of other objects by now
        return change

    def versions(self) -> list[int | None]:
        """How often each tensor was written into, as far as torch counts it."""
        return [None if tensor.is_inference() else tensor._version for tensor in self.tensors]

    def _is_untouched(self) -> bool:
        # all in C: a model has some ten thousand of these
        return all(map(is_, chain.from_iterable(self._live), self._flat)) and self._is_built_alike()

    def _is_built_alike(self) -> bool:
        return (
            list(map(len, self._live)) == self._sizes
            and all(map(is_, map(vars, self._objects), self._attributes))
            and list(map(type, self._objects)) == self._types
            and self._where() == self._places
            and any(self._hooks) == self._is_hooked
        )

    def _adopts_equal_values(self) -> bool:
        """Whether all that is new are numbers and the like, equal to the old: a scale that each call sets, say."""
        if not self._is_built_alike():
            return False
        flat = list(chain.from_iterable(self._live))
        for now, then in zip(flat, self._flat, strict=True):
            if now is not then and not (isinstance(now, _COMPARED) and _is_same(now, then)):
                return False
        self._flat = flat
        return True

    def _difference(self, now: "Frozen") -> str | None:
        for path, other in zip(self._paths, now._paths, strict=False):
            if path != other:
                return min(path, other) or "the model itself"
        at = 0
        for path, size, live in zip(self._paths, self._sizes, now._live, strict=False):
            then, at = self._flat[at : at + size], at + size
            if len(live) != size or not all(map(_is_same, live, then)):
                return path or "the model itself"
        if len(self._paths) != len(now._paths) or self._types != now._types:
            return "the class of something that it holds"
        if self._places != now._places:
            return "the place of a tensor"
        return "a hook" if self._is_hooked != now._is_hooked else None

    def _where(self) -> list[Any]:
        return [(t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) for t in self.tensors]

    def _walk(self) -> None:
        """Look into all, or until there is a reason not to: what has been seen by then tells whether it lasts."""
        seen: set[int] = set()
        left: list[tuple[str, Any]] = [("", self._root)]
        while left and self.refusal is None:
            path, found = left.pop()
            if not isinstance(found, _OPAQUE) and type(found) is not object and id(found) not in seen:
                seen.add(id(found))
                left += self._look_into(path, found)

    def _look_into(self, path: str, found: Any) -> Iterable[tuple[str, Any]]:
        """What is inside of ``found``, with its path; live, so that it is seen to change."""
        if isinstance(found, Tensor):
            return self._add_tensor(path, found)
        if isinstance(found, type):
            return self._add_classes(found)
        if isinstance(found, types.MethodType):
            return self._add(path, (found.__func__, found.__self__))
        if isinstance(found, types.BuiltinFunctionType):
            return [(f"{path}.__self__", found.__self__)]
        if isinstance(found, types.FunctionType):
            self._refuse(why_unknown(path, found))
            # what it was defined around; another value in a cell is not seen
            return self._add(path, [cell.cell_contents for cell in found.__closure__ or () if cell != types.CellType()])
        if isinstance(found, functools.partial):
            return self._add(path, (found.func, found.args, found.keywords))
        inside: list[tuple[str, Any]] = []
        if isinstance(found, dict):
            inside += self._add_dict(path, found)
        elif isinstance(found, _CONTAINERS):
            inside += self._add(path, found)
        is_seen = isinstance(found, _CONTAINERS) or hasattr(found, "__dict__")
        if not is_seen or isinstance(found, random.Random) or any(map(_has_slots, type(found).__mro__)):
            self._refuse(f"{path} is a {type(found).__qualname__}, in which no change would be seen")
        elif hasattr(found, "__dict__") and type(found) is not OrderedDict:  # as those of hooks are, ten a module
            inside += self._add_object(path, found)
        elif type(found).__module__ != "builtins":
            inside += self._add_classes(type(found))
        return inside

    def _add_tensor(self, path: str, tensor: Tensor) -> list[tuple[str, Any]]:
        if type(tensor) not in PLAIN or tensor.layout is not torch.strided:
            self._refuse(f"{path} is a {type(tensor).__qualname__} of layout {tensor.layout}, expected a plain tensor")
        else:
            self.tensors.append(tensor)
        return []

    def _add_object(self, path: str, found: Any) -> list[tuple[str, Any]]:
        self._objects.append(found)
        inside = list(self._add_classes(type(found)))
        attributes = _items(path, vars(found))
        self._add(path, vars(found).values())
        if isinstance(found, Settings):  # but what a module keeps by itself
            attributes = [each for each in attributes if each[1] is not found.kept]
        if not isinstance(found, nn.Module):
            return inside + attributes
        is_root = found is self._root
        if not is_root:
            self._hooks += (found._forward_hooks, found._forward_pre_hooks)
            self._refuse(_why_python_runs(path, found))
        unread = _UNREAD | _AROUND_A_FORWARD if is_root else _UNREAD
        for name, (below, value) in zip(vars(found), attributes, strict=True):
            if name in ("_modules", "_parameters", "_buffers"):
                self._add(path, value.values())
                inside += _items(path, value)
            elif name not in unread:
                inside.append((below, value))
        return inside

    def _add_classes(self, cls: type) -> Iterator[tuple[str, Any]]:
        """Methods and attributes of classes, in whose place somebody may put others."""
        for each in cls.__mro__:
            if each in self._classes or each.__module__ == "builtins":
                continue
            self._classes.add(each)
            copyreg._slotnames(each)  # type: ignore[attr-defined]  # the first copy of an object leaves them on its class
            path = f"the class {each.__qualname__}"
            self._refuse(None if _is_known(each.__module__) else f"{path} is {_of_its_own(each.__module__)}")
            for inside, value in self._add_dict(path, vars(each)):
                self._refuse(why_unknown(inside, value))
                if not _is_known(type(value).__module__):
                    self._refuse(f"{inside} is {_of_its_own(type(value).__module__)}")
                if isinstance(value, (*_CONTAINERS, Tensor)) and not inside.rpartition(".")[2].startswith("__"):
                    yield inside, value

    def _add_dict(self, path: str, found: Mapping[str, Any]) -> list[tuple[str, Any]]:
        self._add(path, found.keys())
        if found:  # as most are not: a module has ten for hooks
            self._add(path, found.values())
        return _items(path, found)

    def _add(self, path: str, live: Collection[Any]) -> list[tuple[str, Any]]:
        self._paths.append(path)
        self._live.append(live)
        return [(f"{path}.{index}", value) for index, value in enumerate(live)]

    def _refuse(self, reason: str | None) -> None:
        if self.refusal is None:
            self.refusal = reason


def _items(path: str, found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    prefix = f"{path}." if path else ""
    return [(f"{prefix}{name}", value) for name, value in found.items()]


def _is_known(module: str | None) -> bool:
    package = (module or "").partition(".")[0]
    return package in _KNOWN or package in sys.stdlib_module_names


def _of_its_own(module: str | None) -> str:
    return f"code of {module}, of which nobody can tell what it reads"


def why_unknown(path: str, value: Any) -> str | None:
    """Why a call of ``value``, or of what an attribute of a class has it call, may read anything; or ``None``."""
    modules = [function.__globals__.get("__name__") for function in _functions_of(value)]
    return next((f"{path} is {_of_its_own(module)}" for module in modules if not _is_known(module)), None)


def _functions_of(value: Any) -> Iterator[types.FunctionType]:
    """The Python functions that an attribute of a class calls, and those that they are wrapped around."""
    parts = (value, *(getattr(value, name, None) for name in ("__func__", "fget", "fset", "fdel", "func")))
    for part in parts:
        while isinstance(part, types.FunctionType):
            yield part
            part = getattr(part, "__wrapped__", None)


def _has_slots(cls: type) -> bool:
    return cls.__module__ != "builtins" and bool(vars(cls).get("__slots__"))


def _why_python_runs(path: str, module: nn.Module) -> str | None:
    """Why a module has to be called from Python every time, as a sentence, or ``None``."""
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{path} has a forward hook, which a graph would run only once"
    if GRAPHS in vars(module):
        return f"{path} has CUDA graphs of its own"
    forward = vars(module).get("forward")
    if forward is not None and not is_method_of(forward, module, type(module)):
        return f"{path} has an instance forward (an offloading or casting hook?), which a graph would run only once"
    if getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules:
        return f"{path} is compiled"
    return None


def _is_same(now: Any, then: Any) -> bool:
    """Whether a value is what it was. What a look goes into may be another object: it is compared inside."""
    if now is then:
        return True
    if type(now) is not type(then):
        return False
    if isinstance(now, _COMPARED):
        return repr(now) == repr(then)  # of 0.0 and -0.0 too
    return not isinstance(now, (*_OPAQUE, type, types.FunctionType, types.BuiltinFunctionType))
