"""A rule: which class of module is replaced, by what, and when not."""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastsd.nn.replacement import Replacement
from fastsd_kernels.dispatch import Op, ops


class PatchError(RuntimeError):
    """The model cannot be patched or unpatched as asked; it is as it was. The message says why."""


def _no_op_calls(module: nn.Module) -> Mapping[str, tuple[Any, ...]]:
    return {}


@dataclass(frozen=True)
class Rule:
    """How one class of module is replaced.

    Args:
        name: what reports call the rule.
        target: the stock class, matched exactly, or its dotted path. A path is looked up only in modules that are
            already imported, so that a rule does not import its library.
        replacement: a subclass of ``target`` and of :class:`fastsd.nn.replacement.Replacement` with ``target``'s
            name, or its dotted path, imported when the rule first matches.
        reject: why this module cannot be replaced, as a sentence; ``None`` where it can.
        op_calls: the ops that the replacement of a module calls, by name, each with arguments such as the module
            would give. A report names the backend that serves them, and a backend that is forced must serve them.
        approximate: whether a replaced module computes another function than the stock one.
        inside: what a module has to be inside of for its replacement to work, by the target of another rule that has
            to replace that; ``None`` where it stands alone.
        passes_on: children that stay modules of their own, for which the rules are asked too. All other modules
            inside belong to the one that is replaced.
    """

    name: str
    target: type[nn.Module] | str
    replacement: type[Replacement] | str
    reject: Callable[[nn.Module], str | None]
    op_calls: Callable[[nn.Module], Mapping[str, tuple[Any, ...]]] = _no_op_calls
    passes_on: tuple[str, ...] = ()
    approximate: bool = False
    inside: str | None = None

    def is_place(self, root: nn.Module, path: str) -> bool:
        """Whether the rule speaks of ``root.<path>``, which is of the target class; of any, unless overridden."""
        return True

    @property
    def target_path(self) -> str:
        if isinstance(self.target, str):
            return self.target
        return f"{self.target.__module__}.{self.target.__qualname__}"

    def target_class(self) -> type[nn.Module] | None:
        """The stock class; ``None`` where its module is not imported, so that nothing can be an instance of it."""
        if not isinstance(self.target, str):
            return self.target
        module, _, name = self.target.rpartition(".")
        return getattr(sys.modules.get(module), name, None)

    def replacement_class(self) -> type[Replacement]:
        """The fast class.

        Raises:
            TypeError: it cannot take the place of the target.
        """
        replacement = self.replacement
        if isinstance(replacement, str):
            module, _, name = replacement.rpartition(".")
            replacement = getattr(importlib.import_module(module), name)
        target = self.target_class()
        if target is None or not issubclass(replacement, Replacement) or not issubclass(replacement, target):
            raise TypeError(
                f"rule {self.name!r}: expected a replacement that derives from Replacement and from "
                f"{self.target_path}; got {replacement}"
            )
        if replacement.__name__ != target.__name__:
            raise TypeError(
                f"rule {self.name!r}: expected a replacement with the name {target.__name__!r}, which device maps and "
                f"offloading look for; got {replacement.__name__!r}"
            )
        return replacement


def find_op(name: str) -> Op:
    """The op of fastsd_kernels that a rule names.

    Raises:
        ValueError: there is no such op.
    """
    by_name = {op.name: op for op in ops()}
    if name not in by_name:
        raise ValueError(f"op_calls: expected ops among {', '.join(by_name)}; got {name!r}")
    return by_name[name]


_registered: dict[str, Rule] = {}


def register_rule(rule: Rule) -> None:
    """Let ``patch`` and ``report`` use ``rule`` from now on.

    Raises:
        ValueError: another rule has this name or this target.
    """
    select_rules([*_registered.values(), rule])
    _registered[rule.name] = rule


def unregister_rule(name: str) -> None:
    """Forget a rule; what it replaced stays replaced until ``unpatch``.

    Raises:
        ValueError: no rule has this name.
    """
    select_rules([name])
    del _registered[name]


def registered_rules() -> tuple[Rule, ...]:
    """The rules that ``patch`` uses, in the order of registration; the built-in ones come first."""
    return tuple(_registered.values())


def select_rules(rules: Iterable[Rule | str] | None) -> tuple[Rule, ...]:
    """``rules`` with names looked up; every registered rule for ``None``.

    Raises:
        TypeError: something among ``rules`` is neither a rule nor a name.
        ValueError: a name is not registered, or two rules share their name or their target.
    """
    if rules is None:
        return registered_rules()
    selected: list[Rule] = []
    if isinstance(rules, str):
        raise TypeError(f"rules: expected a list of rules or names; got the string {rules!r}")
    for rule in rules:
        if isinstance(rule, str):
            if rule not in _registered:
                raise ValueError(f"rules: expected names among {', '.join(_registered)}; got {rule!r}")
            rule = _registered[rule]
        if not isinstance(rule, Rule):
            raise TypeError(f"rules: expected each to be a Rule or a rule's name; got {type(rule).__name__}")
        for other in selected:
            if other.name == rule.name or other.target_path == rule.target_path:
                raise ValueError(
                    f"rules: expected one rule for each name and each target; {rule.name!r} ({rule.target_path}) and "
                    f"{other.name!r} ({other.target_path}) clash"
                )
        selected.append(rule)
    return tuple(selected)
