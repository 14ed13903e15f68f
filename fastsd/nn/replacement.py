"""What every fast module shares: the settings that ``patch`` leaves on it, and copies that are stock."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

if TYPE_CHECKING:
    from fastsd.patching.rule import Rule

SETTINGS = "_fastsd"


@dataclass(frozen=True)
class Settings:
    """What ``patch`` leaves on a replaced module, in its attribute ``_fastsd``; ``unpatch`` takes it away.

    Attributes:
        kept: what its forward keeps from call to call, by name; gone with the settings.
    """

    rule: Rule
    stock: type[nn.Module]
    backend: str | None
    kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)


def active_settings(module: nn.Module) -> Settings | None:
    """The settings of a replaced module; ``None`` also while a stock method that its class overrides is overwritten."""
    settings = settings_of(module)
    if settings is None:
        return None
    methods: dict[str, Any] = getattr(type(module), "overridden", {})
    is_stock = all(getattr(settings.stock, name) is method for name, method in methods.items())
    return settings if is_stock else None


def settings_of(module: nn.Module) -> Settings | None:
    """The settings of a replaced module, ``None`` for any other."""
    # not getattr: the wrapper of a compiled module passes it on to the module inside
    return module.__dict__.get(SETTINGS)


def has_class_of_patch(module: nn.Module, settings: Settings) -> bool:
    """Whether a replaced module still runs the methods of its fast class, which may lie below a mix-in like FSDP2's."""
    fast, now = settings.rule.replacement_class(), type(module)
    if now is fast:
        return True
    own = (vars(base) for base in fast.__mro__ if issubclass(base, Replacement))
    methods = {name for each in own for name, value in each.items() if callable(value)}
    return fast in now.__bases__ and all(getattr(now, name) is getattr(fast, name) for name in methods)


def with_class(module: nn.Module, settings: Settings, cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a replaced module with ``cls`` in the place of the fast one, below what was mixed in since."""
    fast, now = settings.rule.replacement_class(), type(module)
    if cls is fast:
        return now
    if now is fast:
        return cls
    bases = tuple(cls if base is fast else base for base in now.__bases__)
    own = {name: value for name, value in vars(now).items() if name not in ("__dict__", "__weakref__", "overridden")}
    return types.new_class(now.__name__, bases, exec_body=lambda namespace: namespace.update(own))


def call_as(self: nn.Module, fast: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """``self(*args, **kwargs)`` by the forward of ``fast``, its class so far: another thread may give it the stock one.

    For a module that nobody has put anything on (:func:`fastsd.nn.plain.why_not_plain`), which a call would run. Who
    watches calls of modules, as torch's profiler does, does not see this one; a compiler does, which notes for each
    operation what module it is of.
    """
    return self(*args, **kwargs) if torch.compiler.is_compiling() else fast.forward(self, *args, **kwargs)


class Replacement(nn.Module):
    """Base of the fast modules: a subclass of a stock class, with its name, that adds no attribute.

    A stock instance becomes fast by ``module.__class__ = FastClass``, so parameters, buffers, hooks, names and
    ``isinstance`` stay as they are. ``forward`` of a subclass runs the stock forward where :func:`settings_of` is
    ``None``: a hook may have captured the bound method of a module that has since been unpatched. It reads methods of
    its own from the class, as ``FastClass.method(self)``: another thread may unpatch the module while it runs.

    A copy or a pickle is a stock module: it loads where fastsd is not installed.

    Attributes:
        overridden: the stock methods that the class has its own for, by name, as they were when it was defined.
    """

    overridden: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        modules = [base for base in cls.__mro__[1:] if issubclass(base, nn.Module)]  # not a mix-in
        stock = next(base for base in modules if not issubclass(base, Replacement))
        fast = [base for base in cls.__mro__ if issubclass(base, Replacement) and base is not Replacement]
        names = {name for base in fast for name in vars(base)}
        cls.overridden = {name: getattr(stock, name) for name in names if callable(getattr(stock, name, None))}

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        settings = settings_of(self)
        if settings is None:
            return super().__reduce_ex__(protocol)
        # protocol 1, because the form of the later ones must name the object's present class
        reduced: Any = object.__reduce_ex__(self, 1)
        reconstruct, (_, *base), state = reduced
        return reconstruct, (settings.stock, *base), {key: state[key] for key in state if key != SETTINGS}
