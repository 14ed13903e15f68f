"""What became of every module of a model, read off the modules themselves."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fastsd.nn.graphs import COMPILED, graphs_of
from fastsd.nn.replacement import has_class_of_patch, settings_of
from fastsd.patching.rule import Rule, find_op, registered_rules
from fastsd.patching.survey import Finding, parts_of, survey
from fastsd_kernels.dispatch import BackendUnavailable

NO_RULE = "no rule for this class"
NOT_PATCHED = "the model is not patched"


@dataclass(frozen=True)
class Entry:
    """One module.

    Attributes:
        path: where it is in its part, such as ``down_blocks.0.resnets.1``.
        class_name: its class, without the module.
        replaced: whether it has its fast class.
        rule: the name of the rule that knows its class.
        backends: per op that it calls, the backend that would serve it now, where the model is.
        reason: why it runs its stock forward; ``None`` where it runs the fast one.
        approximate: whether it runs a fast one that computes another function.
    """

    path: str
    class_name: str
    replaced: bool
    rule: str | None
    backends: dict[str, str]
    reason: str | None
    approximate: bool = False

    @property
    def ops(self) -> tuple[str, ...]:
        return tuple(self.backends)

    def __str__(self) -> str:
        """What became of the module, in the words of a report's table."""
        calls = ", ".join(f"{op} [{backend}]" for op, backend in self.backends.items())
        became = f"replaced by {self.rule}" if self.replaced else "left"
        became = f"{became} (approximate)" if self.approximate else became
        became = f"{became} → {calls}" if calls else became
        return became if self.reason is None else f"{became}: {self.reason}"


@dataclass(frozen=True)
class CUDAGraphs:
    """The CUDA graphs that a model was given.

    Attributes:
        most: how many it may keep.
        held: how many it has by now.
        reason: why it runs without; ``None`` where it does not, as far as its last call and what it is now tell.
    """

    most: int
    held: int
    reason: str | None

    def __str__(self) -> str:
        held = f"CUDA graphs: {self.held} of at most {self.most}"
        return held if self.reason is None else f"{held}, off: {self.reason}"


@dataclass(frozen=True)
class Part:
    """One model: a pipeline has several, by the pipeline's names; a model alone has the name ``""``.

    ``cuda_graphs`` is ``None`` where ``patch`` was not asked for any.
    """

    name: str
    class_name: str
    entries: tuple[Entry, ...]
    cuda_graphs: CUDAGraphs | None = None

    def __str__(self) -> str:
        title = f"{self.name}: {self.class_name}" if self.name else self.class_name
        title = title if self.cuda_graphs is None else f"{title}\n  {self.cuda_graphs}"
        if all(entry.rule is None for entry in self.entries):
            return f"{title}: left, holds no module that a rule knows"
        known_first = sorted(self.entries, key=lambda entry: (not entry.replaced, entry.rule is None))
        rows = Counter((entry.class_name, str(entry)) for entry in known_first)
        width = max(len(class_name) for class_name, _ in rows)
        lines = [f"  {class_name:<{width}}  {count:>4}  {became}" for (class_name, became), count in rows.items()]
        return "\n".join([title, *lines])


@dataclass(frozen=True)
class PatchReport:
    """Every module of a model: replaced by which rule and op on which backend, or why not.

    Modules inside one that a rule knows belong to it; containers and modules without parameters are not listed.
    """

    parts: tuple[Part, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The modules of every part."""
        return tuple(entry for part in self.parts for entry in part.entries)

    def __str__(self) -> str:
        return "\n".join(map(str, self.parts))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        parts = [asdict(part) for part in self.parts]
        for part in parts:
            part["entries"] = list(part["entries"])
        return {"parts": parts}


def report(model: Any) -> PatchReport:
    """What became of every module of ``model``, patched or not.

    Args:
        model: a model or pipeline, as for :func:`fastsd.patch`; left as it is.

    Raises:
        TypeError: ``model`` is neither a module nor a pipeline.
    """
    rules = registered_rules()
    return PatchReport(
        tuple(
            Part(
                name,
                type(root).__name__,
                tuple(_entry(finding) for finding in survey(root, rules)),
                _cuda_graphs(root),
            )
            for name, root in parts_of(model).items()
        )
    )


def _cuda_graphs(root: nn.Module) -> CUDAGraphs | None:
    model = root._modules.get("_orig_mod") or root  # inside the wrapper of a compiled one
    graphs = graphs_of(model)
    if graphs is None:
        return None
    reason = graphs.why_not(model) if model is root else COMPILED
    return CUDAGraphs(graphs.most, graphs.held, reason)


def _entry(finding: Finding) -> Entry:
    module, rule = finding.module, finding.rule
    settings = settings_of(module)
    if rule is None:
        return Entry(finding.path, type(module).__name__, False, None, {}, NO_RULE)
    reason = finding.refusal
    if reason is None and settings is None:
        reason = NOT_PATCHED
    runs_fast = reason is None
    backends = _backends(rule, module, None if settings is None else settings.backend) if runs_fast else {}
    approximate = runs_fast and rule.approximate
    replaced = settings is not None and has_class_of_patch(module, settings)
    return Entry(finding.path, type(module).__name__, replaced, rule.name, backends, reason, approximate)


def _backends(rule: Rule, module: nn.Module, backend: str | None) -> dict[str, str]:
    return {op: _backend(op, arguments, backend) for op, arguments in rule.op_calls(module).items()}


def _backend(op: str, arguments: tuple[Any, ...], backend: str | None) -> str:
    try:
        return find_op(op).choose(*arguments, backend=backend).name
    except (BackendUnavailable, ValueError) as error:
        return str(error)
