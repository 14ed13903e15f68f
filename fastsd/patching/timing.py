"""The time of one step of a model, by module and by op.

A hook on a module, or a forward put on it, would change what is timed: a replaced module then runs its stock forward
(``fastsd/nn/plain.py``). So calls of modules are seen by ``sys.setprofile``, of which model and ops know nothing.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fastsd.nn.replacement import call_as, settings_of
from fastsd.patching.rule import registered_rules
from fastsd.patching.survey import Finding, survey
from fastsd_kernels.dispatch import Op

NO_OP = "between ops"
_STEP = "fastsd.step"
_MODULE = "fastsd.module."  # and where it is among the findings
_CALLS = tuple(call.__code__ for call in (nn.Module.__call__, call_as))  # type: ignore[attr-defined]
_RUN = Op.run.__code__


@dataclass(frozen=True)
class ModuleTime:
    """All modules of one kind.

    Attributes:
        kind: the name of the rule that knows their class, else the class; for the model itself its class.
        replaced: whether they have their fast class, and no reason to run the stock forward is seen from outside.
        modules: how many the model has.
        calls: of them in the step. None where the module around them computes what they would.
        seconds: inside them, but for what is inside modules of the other rows.
        share: of the step, 0 to 1.
    """

    kind: str
    replaced: bool
    modules: int
    calls: int
    seconds: float
    share: float


@dataclass(frozen=True)
class OpTime:
    """All calls of one op that a module calls, with what the op calls in turn; :data:`NO_OP` is Python and waiting.

    Attributes:
        flops: of an op of fastsd: multiplications and additions of the products in its definition, whatever algorithm
            runs. None for an op without products, and for torch's.
    """

    op: str
    calls: int
    seconds: float
    share: float
    flops: int | None = None


@dataclass(frozen=True)
class StepTime:
    """One step; seconds and shares of ``modules`` add up to the whole, and so do those of ``ops``.

    Attributes:
        device: where the model is.
        seconds: of the host; on a card those of its kernels.
        modules, ops: the slowest first.
    """

    device: str
    seconds: float
    modules: tuple[ModuleTime, ...]
    ops: tuple[OpTime, ...]

    @property
    def replaced_share(self) -> float:
        """The part of the step inside replaced modules, whichever ops these call: see :attr:`fastsd_share`."""
        return sum(row.share for row in self.modules if row.replaced)

    @property
    def fastsd_share(self) -> float:
        """The part of the step inside ops of fastsd."""
        return sum(row.share for row in self.ops if row.op.startswith("fastsd::"))

    def to_dict(self) -> dict[str, Any]:
        """The times as JSON can hold them."""
        shares = {"replaced_share": self.replaced_share, "fastsd_share": self.fastsd_share}
        rows = {"modules": [asdict(row) for row in self.modules], "ops": [asdict(row) for row in self.ops]}
        return {"device": self.device, "seconds": self.seconds} | shares | rows


def time_step(model: nn.Module, step: Callable[[], object], repeats: int = 3) -> StepTime:
    """Where the time of ``step`` goes, which calls ``model``: the run of median length, after one that warms up.

    Modules are those of :func:`fastsd.report`. What is inside one belongs to it, and what is in none to the model.

    Raises:
        ValueError: ``repeats`` is less than 1.
        RuntimeError: the model is on a card, and the profiler sees no kernels of it.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1; got {repeats}")
    findings = list(survey(model, registered_rules()))
    step()
    times = [_timed(model, step, findings) for _ in range(repeats)]
    return sorted(times, key=lambda time: time.seconds)[(repeats - 1) // 2]


def _timed(model: nn.Module, step: Callable[[], object], findings: list[Finding]) -> StepTime:
    device = next(model.parameters()).device
    is_on_card = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_on_card else [])]
    flops: Counter[str] = Counter()
    with profile(activities=activities) as profiler, record_function(_STEP), _calls_recorded(findings, flops):
        step()

    by_place: dict[str, float] = defaultdict(float)
    by_op: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for event in profiler.events() or ():
        if event.device_type != DeviceType.CPU:
            continue
        op, place = _belongs_to(event)
        if place is None:  # the profiler's own
            continue
        seconds = _on_card(event) if is_on_card else event.self_cpu_time_total / 1e6
        by_place[place.name] += seconds
        by_op[NO_OP if op is None else op.name] += seconds
        if event is place or event is op:
            calls[event.name] += 1
    total = sum(by_place.values())
    if total == 0:
        raise RuntimeError(f"the profiler sees no kernels on {device}: has this process the right to profile it?")

    kinds = [(type(model).__name__, False), *map(_kind_of, findings)]
    names = [_STEP, *(f"{_MODULE}{index}" for index in range(len(findings)))]
    of_kind = {kind: [name for name, other in zip(names, kinds, strict=True) if other == kind] for kind in kinds}
    modules = []
    for kind, own in of_kind.items():
        seconds = sum(by_place[name] for name in own)
        modules.append(ModuleTime(*kind, len(own), sum(calls[name] for name in own), seconds, seconds / total))
    ops = [OpTime(op, calls[op], seconds, seconds / total, flops.get(op)) for op, seconds in by_op.items()]
    return StepTime(str(device), total, _slowest_first(modules), _slowest_first(ops))


@contextmanager
def _calls_recorded(findings: Iterable[Finding], flops: Counter[str]) -> Iterator[None]:
    """Let the profiler see when each of the modules is called and when it returns; count the ops' flops by name."""
    names = {id(finding.module): f"{_MODULE}{index}" for index, finding in enumerate(findings)}
    open_ranges: list[record_function | None] = []

    def see(frame: FrameType, event: str, result: Any) -> None:
        if frame.f_code is _RUN and event == "return":
            count(frame.f_locals["self"], frame.f_locals["given"], result)
        if frame.f_code not in _CALLS:
            return
        if event == "call":
            name = names.get(id(frame.f_locals["self"]))
            open_ranges.append(None if name is None else record_function(name).__enter__())
        elif event == "return":  # by an exception too
            opened = open_ranges.pop()
            if opened is not None:
                opened.__exit__(None, None, None)

    def count(op: Op, given: tuple[Any, ...], result: Any) -> None:
        # without a result an exception is on its way
        if op.flops is not None and result is not None:
            flops[f"fastsd::{op.name}"] += op.flops(*given, out_val=result)

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(before)


def _is_range(name: str) -> bool:
    return name == _STEP or name.startswith(_MODULE)


def _belongs_to(event: Any) -> tuple[Any, Any]:
    """The op that a module called and that this event is part of, and the range of that module; ``None`` for no such.

    So what a backend calls counts to the op of fastsd that it serves.
    """
    op = None
    while event is not None and not _is_range(event.name):
        op, event = event, event.cpu_parent
    return op, event


def _on_card(event: Any) -> float:
    """Seconds of the kernels that ``event`` launched itself; a range has another on the card, which is none."""
    return sum(kernel.duration for kernel in event.kernels if not _is_range(kernel.name)) / 1e6


def _kind_of(finding: Finding) -> tuple[str, bool]:
    module, rule = finding.module, finding.rule
    if rule is None:
        return type(module).__name__, False
    return rule.name, settings_of(module) is not None and finding.refusal is None


def _slowest_first(rows: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(sorted(rows, key=lambda row: -row.seconds))
