"""The parts of a model or pipeline, and what the rules say of every module in them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastsd.nn.plain import is_method_of, is_overwritten
from fastsd.nn.replacement import Settings, active_settings, has_class_of_patch, settings_of
from fastsd.patching.rule import Rule


@dataclass(frozen=True)
class Finding:
    """One module of a part: what ``rule`` says of it.

    ``rule`` is ``None`` where no rule knows the class, and ``refusal`` where the rule can replace the module.
    """

    path: str
    module: nn.Module
    rule: Rule | None
    refusal: str | None = None


def parts_of(model: Any) -> dict[str, nn.Module]:
    """The modules to look through, by the name of the part; a model that is no pipeline is one part, ``""``.

    Raises:
        TypeError: ``model`` is neither a module nor a pipeline.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    components = getattr(model, "components", None)
    if not isinstance(components, Mapping):
        raise TypeError(f"model: expected a diffusers model or pipeline; got an object of type {type(model).__name__}")
    parts: dict[str, nn.Module] = {}
    for name, component in components.items():
        several = isinstance(component, list | tuple)
        for index, part in enumerate(component if several else [component]):
            if isinstance(part, nn.Module) and all(part is not known for known in parts.values()):
                parts[f"{name}.{index}" if several else name] = part
    return parts


def survey(root: nn.Module, rules: Iterable[Rule], *, before_a_patch: bool = False) -> Iterator[Finding]:
    """Every module below ``root`` that a rule knows, and every other that holds parameters of its own.

    A replacement that works only inside another one is refused where that is not there; ``before_a_patch``: where it
    will not be.

    A module that is replaced already belongs to the rule that replaced it, unless that is to change: before a patch
    for which ``rules`` has one for its stock class. Modules inside one that a rule knows belong to it, but for the
    children that the rule passes on: of them, only those with a rule of their own inside one that is refused are
    found. The root is never found: its class is saved with the model.
    """
    by_target: dict[type[nn.Module] | None, list[Rule]] = {}
    for given in rules:
        by_target.setdefault(given.target_class(), []).append(given)
    seen = {id(root)}
    replaceable: set[str] = set()  # paths

    def visit(modules: Iterable[tuple[str, nn.Module]], inside_refused: bool) -> Iterator[Finding]:
        for path, module in modules:
            if id(module) in seen:
                continue
            seen.add(id(module))
            settings = settings_of(module)
            stock = type(module) if settings is None else settings.stock
            if settings is not None and not before_a_patch:
                rule: Rule | None = settings.rule
            else:
                rule = _rule_of(by_target.get(stock, []), settings, root, path)
            refusal = None
            if rule is not None:
                refusal = _refusal(module, stock, rule) or _why_alone(
                    root, path, rule, replaceable if before_a_patch else set()
                )
                if refusal is None:
                    replaceable.add(path)
                yield Finding(path, module, rule, refusal)
            elif not inside_refused and any(p is not None for p in module._parameters.values()):
                yield Finding(path, module, None)
            inside = {f"{path}.{name}": child for name, child in module.named_children()}
            if rule is not None and refusal is None:
                inside = {at: child for at, child in inside.items() if at.rpartition(".")[2] in rule.passes_on}
            yield from visit(inside.items(), inside_refused or refusal is not None)

    return visit(root.named_children(), False)


def _refusal(module: nn.Module, stock: type[nn.Module], rule: Rule) -> str | None:
    settings = settings_of(module)
    if settings is not None and settings.rule.approximate and active_settings(module) is None:
        return f"a method of {stock.__name__} has been overwritten since"
    if settings is not None and not has_class_of_patch(module, settings):
        return f"its class is {type(module).__module__}.{type(module).__qualname__} by now"
    if settings is None:
        for name in rule.replacement_class().overridden:
            if is_overwritten(stock, name):
                return f"{stock.__name__}.{name} has been overwritten by {getattr(stock, name).__module__}"
        forward = module.__dict__.get("forward")
        if forward is not None and not is_method_of(forward, module, rule.replacement_class()):
            return f"{stock.__name__} has an instance forward (an offloading hook, or what is left of one)"
    return rule.reject(module)


def _rule_of(rules: list[Rule], settings: Settings | None, root: nn.Module, path: str) -> Rule | None:
    """Of the rules that are asked for and the one that has replaced the module, the one that counts."""
    # what approximates is asked for by name, and comes first where it is
    asked = sorted((rule for rule in rules if rule.is_place(root, path)), key=lambda rule: not rule.approximate)
    if settings is None:
        return asked[0] if asked else None
    # and it goes only by another choice of that
    is_chosen_anew = any(rule.approximate for rule in rules)
    if not asked or (settings.rule.approximate and not asked[0].approximate and not is_chosen_anew):
        return settings.rule
    return asked[0]


def _why_alone(root: nn.Module, path: str, rule: Rule, replaceable: set[str]) -> str | None:
    """Why the replacement of a module would not work where it is, as a sentence, or ``None``.

    ``replaceable``: of the modules around it, those that will be replaced.
    """
    if rule.inside is None:
        return None
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        place = ".".join(parts[:end])
        around = root.get_submodule(place)
        settings = settings_of(around)
        stock = type(around) if settings is None else settings.stock
        if f"{stock.__module__}.{stock.__qualname__}" == rule.inside:
            is_replaced = active_settings(around) is not None or place in replaceable
            return None if is_replaced else f"the {stock.__qualname__} around it is left as it is"
    return f"it is in no {rule.inside.rpartition('.')[2]}"
