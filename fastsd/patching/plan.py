"""The first phase of a patch: decide every change, and find every reason not to, before any is made."""

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fastsd.compress.compression import Compression
from fastsd.gri import GRI, level_of, levels_of
from fastsd.nn.graph_calls import takes_timestep
from fastsd.nn.graphs import MOST, Graphs, give_graphs, graphs_of, has_forward_of_another
from fastsd.nn.replacement import SETTINGS, Settings, has_class_of_patch, settings_of, with_class
from fastsd.patching.rule import PatchError, Rule, find_op, select_rules
from fastsd.patching.rules.gri_attention import GRIRule, gri_rule
from fastsd.patching.rules.transformer import TRANSFORMER
from fastsd.patching.rules.transformer_block import TRANSFORMER_BLOCK
from fastsd.patching.survey import Finding, parts_of, survey
from fastsd_kernels.dispatch import BACKENDS


@dataclass(frozen=True)
class Change:
    """One module's next class and settings; ``settings`` is ``None`` for the stock class."""

    module: nn.Module
    cls: type[nn.Module]
    settings: Settings | None

    @property
    def is_stock(self) -> bool:
        """Whether it leaves nothing of fastsd."""
        return self.settings is None

    def is_made(self) -> bool:
        return settings_of(self.module) is self.settings and type(self.module) is self.cls

    def back(self) -> "Change":
        """What leads back to where the module is now."""
        return Change(self.module, type(self.module), settings_of(self.module))

    def make(self) -> None:
        self.module.__class__ = self.cls
        if self.settings is None:
            self.module.__dict__.pop(SETTINGS, None)
        else:
            self.module.__dict__[SETTINGS] = self.settings


@dataclass(frozen=True)
class GraphsChange:
    """One model's next CUDA graphs; ``None`` for none."""

    root: nn.Module
    graphs: Graphs | None

    @property
    def is_stock(self) -> bool:
        return self.graphs is None

    def is_made(self) -> bool:
        return graphs_of(self.root) is self.graphs

    def back(self) -> "GraphsChange":
        return GraphsChange(self.root, graphs_of(self.root))

    def make(self) -> None:
        give_graphs(self.root, self.graphs)


@dataclass(frozen=True)
class Plan:
    """What ``patch`` is about to do: the changes, and the modules that a rule knows but refuses."""

    changes: tuple[Change | GraphsChange, ...]
    refused: tuple[Finding, ...]


def plan_patch(
    model: Any,
    *,
    strict: bool = False,
    backend: str | None = None,
    rules: Iterable[Rule | str] | None = None,
    gri: GRI | None = None,
    cuda_graphs: bool | int | None = None,
) -> Plan:
    """The plan of ``patch``, with its arguments and its errors; changes nothing."""
    if gri is None and rules is None:
        gri = _planned_gri(model)
    chosen = select_rules(rules) if gri is None else _with_gri(select_rules(rules), model, gri)
    # by module: parts may share some
    by_module = {
        finding.module: replace(finding, path=f"{part}.{finding.path}" if part else finding.path)
        for part, root in parts_of(model).items()
        for finding in (*survey(root, chosen, before_a_patch=True), *_out_of_reach(root, gri))
        # without a new choice of GRI attention the old one stays, and gets the other arguments
        if finding.rule in chosen or (gri is rules is None and isinstance(finding.rule, GRIRule))
    }
    known = list(by_module.values())
    if not known:
        targets = ", ".join(rule.target_path for rule in chosen)
        raise ValueError(
            f"model: expected one that holds a module that a rule knows ({targets or 'there is no rule'}); "
            f"{type(model).__name__} holds none (the model itself is never replaced, only modules in it)"
        )
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    refused = tuple(finding for finding in known if finding.refusal is not None)
    if strict and refused:
        raise PatchError(f"{len(refused)} of {len(known)} modules cannot be replaced: {describe(refused)}")
    changes = [] if gri is None else _without_earlier_gri(model, by_module)
    for finding in known:
        # a module that is replaced already may be refused for now, and run the fast forward again later
        is_earlier = isinstance(finding.rule, GRIRule) and _is_replaced(finding.module)
        if finding.rule is not None and (finding.refusal is None or is_earlier):
            _require_backend(finding.rule, finding.module, backend)
            change = _change(finding.rule, finding.module, backend)
            if (type(change.module), settings_of(change.module)) != (change.cls, change.settings):
                changes.append(change)
    of_graphs = _graphs_changes(model, cuda_graphs)
    return Plan((*changes, *_transformers_anew(changes, known), *of_graphs), refused)


def _graphs_changes(model: Any, cuda_graphs: bool | int | None) -> list[GraphsChange]:
    if cuda_graphs is None:
        return []
    if type(cuda_graphs) not in (bool, int) or cuda_graphs < 0:
        raise ValueError(f"cuda_graphs: expected True, False or a number of graphs, or None; got {cuda_graphs!r}")
    most = MOST if cuda_graphs is True else int(cuda_graphs)
    if most == 0:
        return [GraphsChange(root, None) for root in parts_of(model).values() if graphs_of(root) is not None]
    changes = []
    roots = {name: root for name, root in parts_of(model).items() if takes_timestep(root)}
    if not roots:
        raise ValueError(
            "cuda_graphs: expected a U-Net, a ControlNet or a pipeline with one, which pipelines call by their "
            f"forward with a timestep; got {type(model).__name__}"
        )
    for name, root in roots.items():
        earlier = graphs_of(root)
        if earlier is None and has_forward_of_another(root):
            raise PatchError(
                f"cuda_graphs: {name or type(root).__name__} has an instance forward (an offloading hook?), which "
                "graphs would have to go inside of: take it off, patch, and put it on again"
            )
        if earlier is None or earlier.most != most or earlier.given_up is not None:
            changes.append(GraphsChange(root, Graphs(most)))
    return changes


def _planned_gri(model: Any) -> GRI | None:
    """What a compression asks for, unless an earlier patch has chosen already."""
    for root in parts_of(model).values():
        compression = getattr(root, "compression", None)
        if isinstance(compression, Compression) and compression.plan.gri is not None:
            earlier = (settings_of(module) for module in root.modules())
            if not any(settings is not None and isinstance(settings.rule, GRIRule) for settings in earlier):
                return compression.plan.gri
    return None


def _with_gri(chosen: tuple[Rule, ...], model: Any, gri: GRI) -> tuple[Rule, ...]:
    """The rules, and what ``gri`` needs: its own, and that of the transformers, which know the size of the map."""
    if not isinstance(gri, GRI):
        raise TypeError(f"gri: expected a fastsd.GRI, or None; got {type(gri).__name__}")
    there = {level for root in parts_of(model).values() for level in levels_of(root)}
    if not there.issuperset(gri.levels):
        found = ", ".join(map(str, sorted(there))) or "none; it looks for a U-Net or ControlNet"
        raise ValueError(f"gri: expected levels of the model that have transformers ({found}); got {gri.levels}")
    # it goes before that of the other blocks; one of a user's for them clashes
    others = [rule for rule in chosen if rule is not TRANSFORMER_BLOCK]
    with_own = select_rules([*others, *(() if TRANSFORMER in others else (TRANSFORMER,)), gri_rule(gri)])
    return (*with_own, TRANSFORMER_BLOCK) if TRANSFORMER_BLOCK in chosen else with_own


def _out_of_reach(root: nn.Module, gri: GRI | None) -> Iterable[Finding]:
    """Blocks of the levels that ``gri`` names whose class is another than the rule's."""
    if gri is None:
        return
    rule = gri_rule(gri)
    for path, module in root.named_modules():
        settings = settings_of(module)
        stock = type(module) if settings is None else settings.stock
        is_compiled = hasattr(module, "_orig_mod")  # a wrapper; what it holds is found by itself
        if level_of(root, path) in gri.levels and stock is not rule.target_class() and not is_compiled:
            yield Finding(path, module, rule, f"it is a {stock.__qualname__}, expected {rule.target_path}")


def _transformers_anew(changes: Iterable[Change], known: Iterable[Finding]) -> list[Change]:
    """Settings of its own for each transformer whose blocks get GRI attention, which does not work without it.

    So that what was patched for a ``with`` block, by its end, is not what this patch relies on.
    """
    of_gri = {change.module for change in changes if change.settings and isinstance(change.settings.rule, GRIRule)}
    anew = []
    for finding in known:
        settings = settings_of(finding.module)
        if finding.rule is TRANSFORMER and settings is not None and of_gri.intersection(finding.module.modules()):
            anew.append(Change(finding.module, type(finding.module), replace(settings)))
    return [change for change in anew if all(change.module is not other.module for other in changes)]


def _is_replaced(module: nn.Module) -> bool:
    settings = settings_of(module)
    return settings is not None and has_class_of_patch(module, settings)


def _without_earlier_gri(model: Any, by_module: Container[nn.Module]) -> list[Change]:
    """Stock again: what an earlier patch gave GRI attention, and the new choice leaves out."""
    changes = []
    for root in parts_of(model).values():
        for module in root.modules():
            settings = settings_of(module)
            if settings is None or not isinstance(settings.rule, GRIRule) or module in by_module:
                continue
            if has_class_of_patch(module, settings):
                changes.append(_stock_again(module, settings))
    return changes


def plan_unpatch(model: Any) -> Plan:
    """The plan of ``unpatch``, with its argument and its errors; changes nothing."""
    changes: list[Change | GraphsChange] = []
    for root in parts_of(model).values():
        for path, module in root.named_modules():
            if graphs_of(module) is not None:
                changes.append(GraphsChange(module, None))
            settings = settings_of(module)
            if settings is None:
                continue
            if not has_class_of_patch(module, settings):
                raise PatchError(
                    f"{path}: expected the class that patch gave it; got {type(module).__qualname__}: undo what was "
                    "done to the model after patch first"
                )
            changes.append(_stock_again(module, settings))
    return Plan(tuple(changes), ())


def describe(refused: Iterable[Finding]) -> str:
    """The refusals as ``path: sentence; path: sentence``."""
    return "; ".join(f"{finding.path}: {finding.refusal}" for finding in refused)


def _change(rule: Rule, module: nn.Module, backend: str | None) -> Change:
    settings, fast = settings_of(module), rule.replacement_class()
    if settings is None:
        return Change(module, fast, Settings(rule, type(module), backend))
    return Change(module, with_class(module, settings, fast), Settings(rule, settings.stock, backend))


def _stock_again(module: nn.Module, settings: Settings) -> Change:
    return Change(module, with_class(module, settings, settings.stock), None)


def _require_backend(rule: Rule, module: nn.Module, backend: str | None) -> None:
    for op, arguments in rule.op_calls(module).items():
        find_op(op).choose(*arguments, backend=backend)  # looks at $FASTSD_BACKEND too
