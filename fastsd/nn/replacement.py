"""What every fast module shares: the settings that ``patch`` leaves on it, and copies that are stock."""

from __future__ import annotations

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
        stock = next(base for base in cls.__mro__[1:] if not issubclass(base, Replacement))
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
