"""What the kernels of all gates cost, as it was measured: ``lock.json``, so that unchanged kernels need no compiler.

An entry counts while its key is that of the gate: a digest of all that the machine code depends on. Limits are not in
the lock, they are the gates' own. After a change to kernels or gates::

    python -m tests.budgets.lock         # compiles what the lock lacks, drops what no gate has, says what changed
    python -m tests.budgets.lock --full  # compiles everything
"""

import functools
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.budgets.cubin import INSTRUCTIONS, KernelResources
from tests.budgets.targets import TARGETS

if TYPE_CHECKING:
    from tests.budgets.gates import Gate

PATH = Path(__file__).with_suffix(".json")
COMMAND = "python -m tests.budgets.lock"
_TOOLCHAIN = "toolchain"


@dataclass(frozen=True)
class Entry:
    key: str
    found: KernelResources


@dataclass(frozen=True)
class Lock:
    """Entries by :meth:`Gate.label <tests.budgets.gates.Gate.label>`, and the compilers that they are by."""

    toolchain: list[str]
    entries: dict[str, Entry]

    @functools.cached_property
    def _found(self) -> dict[str, KernelResources]:
        return {entry.key: entry.found for entry in self.entries.values()}

    def find(self, key: str) -> KernelResources | None:
        """What was measured; if nothing was, a warning says why and what to do, the same each time."""
        if key not in self._found and self.is_of_these_compilers():
            warnings.warn(f"{PATH.name} lacks what is compiled instead; `{COMMAND}` records it", stacklevel=2)
        return self._found.get(key)

    def is_of_these_compilers(self) -> bool:
        """If not, a warning says so, the same each time."""
        same = self.toolchain == toolchain()
        if not same:
            ours, theirs = (", ".join(versions) or "nothing" for versions in (toolchain(), self.toolchain))
            warnings.warn(f"{PATH.name} is by {theirs}; here everything is compiled, by {ours}", stacklevel=3)
        return same

    def difference(self, gate: "Gate", target: str, found: KernelResources) -> str | None:
        """What the lock says otherwise of a kernel that was compiled, and the command that mends it."""
        label = gate.label(target)
        entry = self.entries.get(label)
        if not self.is_of_these_compilers():
            return None
        if entry is None or entry.key != gate.key(target):
            return f"{label}: {'missing' if entry is None else 'of another source'} in {PATH.name}; run `{COMMAND}`"
        if entry.found != found:
            return f"{label}: {_change(entry.found, found)} since {PATH.name}; run `{COMMAND} --full`"
        return None

    def stale(self, gates: Iterable["Gate"]) -> list[str]:
        """The labels of entries that no gate has."""
        return sorted(self.entries.keys() - {gate.label(target) for gate in gates for target in gate.targets})

    def dump(self) -> str:
        lines = [f"{json.dumps(_TOOLCHAIN)}: {json.dumps(self.toolchain)}"]
        for label, entry in sorted(self.entries.items()):
            line = {"key": entry.key} | _figures(entry.found)
            lines.append(f"{json.dumps(label, ensure_ascii=False)}: {json.dumps(line)}")
        return "{\n" + ",\n".join(lines) + "\n}\n"


@functools.cache
def read() -> Lock:
    return load(PATH.read_text() if PATH.exists() else "{}")


def load(text: str) -> Lock:
    """The inverse of :meth:`Lock.dump`."""
    given = json.loads(text)
    by = given.pop(_TOOLCHAIN, [])
    return Lock(by, {label: Entry(line.pop("key"), _resources(line)) for label, line in given.items()})


def _figures(found: KernelResources) -> dict[str, int]:
    """Figures by name, instructions that a kernel has not left out."""
    return {
        "registers": found.registers,
        "stack": found.stack_bytes,
        "static shared": found.static_shared_bytes,
        "dynamic shared": found.dynamic_shared_bytes,
    } | {name: count for name, count in found.instructions.items() if count}


def _resources(line: dict[str, int]) -> KernelResources:
    counts = {name: line.get(name, 0) for name in INSTRUCTIONS}
    return KernelResources(line["registers"], line["stack"], line["static shared"], counts, line["dynamic shared"])


def _change(before: KernelResources, after: KernelResources) -> str:
    old, new = _figures(before), _figures(after)
    changed = [name for name in dict.fromkeys((*old, *new)) if old.get(name, 0) != new.get(name, 0)]
    return ", ".join(f"{name} {old.get(name, 0)} → {new.get(name, 0)}" for name in changed) or "the same figures"


@functools.cache
def toolchain() -> list[str]:
    nvrtc = import_module("tests.budgets.units").nvrtc_version()
    triton = import_module("tests.budgets.triton_aot").toolchain
    return [nvrtc, *dict.fromkeys(version for target in TARGETS for version in triton(target))]


def updated(before: Lock, gates: list["Gate"], full: bool) -> Lock:
    """A lock of ``gates``, what ``before`` lacks compiled, or everything."""
    wanted = {gate.label(target): (gate, target) for gate in gates for target in gate.targets}
    known = {} if full else {entry.key: entry.found for entry in before.entries.values()}
    # gates of one cubin are measured together
    units: dict[str, list[tuple[int, str]]] = {}
    for number, gate in enumerate(gates):
        for target in gate.targets:
            if gate.key(target) not in known:
                units.setdefault(gate.unit.digest(target), []).append((number, target))
    for done, measured in enumerate(_measure(list(units.values()), full), start=1):
        known |= measured
        print(f"{done} of {len(units)} cubins", end="\r", file=sys.stderr)
    entries = {label: Entry(gate.key(target), known[gate.key(target)]) for label, (gate, target) in wanted.items()}
    return Lock(toolchain(), entries)


def _measure(units: list[list[tuple[int, str]]], full: bool) -> Iterator[dict[str, KernelResources]]:
    # not forked: torch has threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(units) or 1), context) as pool:
        yield from pool.map(_measure_unit, units, [full] * len(units))


def _measure_unit(unit: list[tuple[int, str]], full: bool) -> dict[str, KernelResources]:
    (first, target), gates = unit[0], all_gates()
    compiled = gates[first].unit.compile(target) if full else gates[first].unit.compiled(target)
    return {gates[number].key(target): gates[number].read(compiled, target) for number, target in unit}


@functools.cache
def all_gates() -> list[Any]:
    gates = import_module("tests.budgets.gates")
    return [gate for op in gates.gated_ops() for gate in gates.gates_of(op)]


def changes(before: Lock, after: Lock) -> list[str]:
    """A sentence for each entry that is not as it was."""
    lines = []
    for label in sorted(before.entries.keys() | after.entries.keys()):
        old, new = before.entries.get(label), after.entries.get(label)
        if old is None or new is None:
            lines.append(f"{label}: {'new' if old is None else 'gone'}")
        elif old != new:
            lines.append(
                f"{label}: {_change(old.found, new.found)}{'' if old.key == new.key else ', of another source'}"
            )
    return lines


def main(args: list[str]) -> None:
    if args not in ([], ["--full"]):
        sys.exit(__doc__)
    before = read()
    after = updated(before, all_gates(), full=bool(args))
    PATH.write_text(after.dump())
    print(*(changes(before, after) or ["nothing changed"]), sep="\n")
    if before.toolchain != after.toolchain:
        print(f"by {', '.join(after.toolchain)}; before by {', '.join(before.toolchain) or 'none'}")


if __name__ == "__main__":
    # the gates import this module by its name; as __main__ it would be there twice
    import_module("tests.budgets.lock").main(sys.argv[1:])
