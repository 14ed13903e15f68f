"""The first phase of a patch: decide every change, and find every reason not to, before any is made."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fastsd.nn.replacement import Settings, settings_of
from fastsd.patching.rule import PatchError, Rule, find_op, select_rules
from fastsd.patching.survey import Finding, parts_of, survey
from fastsd_kernels.conv2d.packed_weights import WeightBudget
from fastsd_kernels.dispatch import BACKENDS

# times the bytes of the model's parameters. A stock model takes more than these when it runs, so that the peak of a
# patched one stays below twice that; and all copies that SD1.5's 64² latents ask for find room
DEFAULT_EXTRA_MEMORY = 1.0


@dataclass(frozen=True)
class Change:
    """One module's next class and settings; ``settings`` is ``None`` for the stock class."""

    module: nn.Module
    cls: type[nn.Module]
    settings: Settings | None


@dataclass(frozen=True)
class Plan:
    """What ``patch`` is about to do: the changes, and the modules that a rule knows but refuses."""

    changes: tuple[Change, ...]
    refused: tuple[Finding, ...]


def plan_patch(
    model: Any,
    *,
    strict: bool = False,
    backend: str | None = None,
    rules: Iterable[Rule | str] | None = None,
    max_extra_memory: int | None = None,
) -> Plan:
    """The plan of ``patch``, with its arguments and its errors; changes nothing."""
    chosen = select_rules(rules)
    # by module: parts may share some
    by_module = {
        finding.module: replace(finding, path=f"{part}.{finding.path}" if part else finding.path)
        for part, root in parts_of(model).items()
        for finding in survey(root, chosen)
        if finding.rule in chosen
    }
    known = list(by_module.values())
    if not known:
        targets = ", ".join(rule.target_path for rule in chosen)
        raise ValueError(
            f"model: expected one that holds a module that a rule knows ({targets or 'there is no rule'}); "
            f"{type(model).__name__} holds none (the model itself is never replaced, only modules in it)"
        )
    if max_extra_memory is not None and (type(max_extra_memory) is not int or max_extra_memory < 0):
        raise ValueError(f"max_extra_memory: expected a number of bytes, or None; got {max_extra_memory!r}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    refused = tuple(finding for finding in known if finding.refusal is not None)
    if strict and refused:
        raise PatchError(f"{len(refused)} of {len(known)} modules cannot be replaced: {describe(refused)}")
    budget = _budget(model, max_extra_memory)
    changes = []
    for finding in known:
        if finding.rule is not None and finding.refusal is None:
            _require_backend(finding.rule, finding.module, backend)
            change = _change(finding.rule, finding.module, backend, budget)
            if (type(change.module), settings_of(change.module)) != (change.cls, change.settings):
                changes.append(change)
    return Plan(tuple(changes), refused)


def plan_unpatch(model: Any) -> Plan:
    """The plan of ``unpatch``, with its argument and its errors; changes nothing."""
    changes = []
    for root in parts_of(model).values():
        for path, module in root.named_modules():
            settings = settings_of(module)
            if settings is None:
                continue
            if type(module) is not settings.rule.replacement_class():
                raise PatchError(
                    f"{path}: expected the class that patch gave it; got {type(module).__qualname__}: undo what was "
                    "done to the model after patch first"
                )
            changes.append(Change(module, settings.stock, None))
    return Plan(tuple(changes), ())


def describe(refused: Iterable[Finding]) -> str:
    """The refusals as ``path: sentence; path: sentence``."""
    return "; ".join(f"{finding.path}: {finding.refusal}" for finding in refused)


def _budget(model: Any, max_extra_memory: int | None) -> WeightBudget:
    """The one that an earlier patch of the model left, unless another bound is wanted; else a new one."""
    roots = list(parts_of(model).values())
    for root in roots:
        for module in root.modules():
            settings = settings_of(module)
            if settings is not None and max_extra_memory in (None, settings.budget.max_bytes):
                return settings.budget
    if max_extra_memory is None:
        parameters = {id(p): p.nbytes for root in roots for p in root.parameters()}
        max_extra_memory = int(DEFAULT_EXTRA_MEMORY * sum(parameters.values()))
    return WeightBudget(max_extra_memory)


def _change(rule: Rule, module: nn.Module, backend: str | None, budget: WeightBudget) -> Change:
    settings = settings_of(module)
    stock = type(module) if settings is None else settings.stock
    return Change(module, rule.replacement_class(), Settings(rule, stock, backend, budget))


def _require_backend(rule: Rule, module: nn.Module, backend: str | None) -> None:
    for op, arguments in rule.op_calls(module).items():
        find_op(op).choose(*arguments, backend=backend)  # looks at $FASTSD_BACKEND too
