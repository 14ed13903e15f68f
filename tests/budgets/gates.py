"""Limits on what the compiled kernels cost, checked on cubins without a GPU.

Each op lists its gates in ``tests/budgets/ops/<op>.py``, in a function ``gates() -> Iterator[Gate]``. A table of them
all, measured, for every target::

    python -m tests.budgets.gates [op]
"""

import functools
import importlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.artefacts import digest
from tests.budgets import cubin, lock
from tests.budgets.cubin import INSTRUCTIONS, SPILL, KernelResources
from tests.budgets.targets import TARGETS
from tests.budgets.units import Compiled, Unit

# Shared memory that a block may have on the cards from compute capability 8.0 on that have least
SHARED_BYTES = 99 * 1024

_inspect = functools.cache(cubin.inspect)
_anew: dict[str, Compiled] = {}


class GateViolation(AssertionError):
    """A kernel costs more than its gate allows; the message says where and by how much."""


@dataclass(frozen=True)
class Gate:
    """What one variant of one kernel may cost, on every target. ``None`` is no limit.

    Attributes:
        unit: what is compiled.
        kernel: its name in the cubin.
        variant: what the kernel is specialised for, for people.
        registers: at most, per thread.
        stack_bytes: at most, per thread.
        static_shared_bytes: at most, per block.
        dynamic_shared_bytes: at most, per block; of Triton, which alone tells.
        required, forbidden: names in ``INSTRUCTIONS``.
        as_many: such a name, and the gate of a kernel that must have as many of them.
    """

    op: str
    unit: Unit
    kernel: str
    variant: str
    registers: int | None = None
    stack_bytes: int | None = 0
    static_shared_bytes: int | None = 0
    dynamic_shared_bytes: int | None = SHARED_BYTES
    required: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = (SPILL,)
    as_many: tuple[str, "Gate"] | None = None
    targets: tuple[str, ...] = TARGETS

    def __str__(self) -> str:
        return f"{self.unit.backend}-{self.kernel}-{self.variant.replace(' ', '-')}"

    def key(self, target: str) -> str:
        """A digest of everything that :meth:`measure` depends on."""
        return digest(self.unit.digest(target), self.kernel, INSTRUCTIONS)

    def label(self, target: str) -> str:
        return f"{self.op} {self} {target}"

    def measure(self, target: str, anew: bool = False) -> KernelResources:
        """What the kernel costs on ``target``, as the lock has it, else compiled; compiled in any case if ``anew``."""
        if anew:
            return self.read(self.compiled_anew(target), target)
        return lock.read().find(self.key(target)) or self.read(self.unit.compiled(target), target)

    def compiled_anew(self, target: str) -> Compiled:
        """Compiled by this process."""
        unit = self.unit.digest(target)
        if unit not in _anew:
            _anew[unit] = self.unit.compile(target)
        return _anew[unit]

    def read(self, compiled: Compiled, target: str) -> KernelResources:
        """What the kernel costs that is in a cubin."""
        kernels = _inspect(compiled.cubin)
        if self.kernel not in kernels:
            raise GateViolation(f"{self._where(target)}: not in the cubin, which has {', '.join(kernels) or 'nothing'}")
        return replace(kernels[self.kernel], dynamic_shared_bytes=compiled.dynamic_shared_bytes)

    def check(self, target: str, anew: bool = False) -> None:
        """Hold the kernel to the limits on ``target``.

        Raises:
            GateViolation: naming kernel, target, each limit that is exceeded and the value found.
        """
        found = self.measure(target, anew)
        broken = [
            f"{value} {what}, at most {limit} allowed"
            for what, value, limit in (
                ("registers", found.registers, self.registers),
                ("bytes of stack", found.stack_bytes, self.stack_bytes),
                ("bytes of static shared memory", found.static_shared_bytes, self.static_shared_bytes),
                ("bytes of dynamic shared memory", found.dynamic_shared_bytes, self.dynamic_shared_bytes),
            )
            if limit is not None and value > limit
        ]
        counts = found.instructions
        broken += [f"no {name} instruction, at least 1 required" for name in self.required if not counts[name]]
        broken += [f"{counts[name]} {name} instructions, none allowed" for name in self.forbidden if counts[name]]
        if self.as_many is not None:
            name, other = self.as_many
            expected = other.measure(target, anew).instructions[name]
            if counts[name] != expected:
                broken.append(f"{counts[name]} {name} instructions, {expected} as in {other} expected")
        if broken:
            raise GateViolation(f"{self._where(target)}: {'; '.join(broken)}")

    def _where(self, target: str) -> str:
        return f"{self.op}: {self.unit.backend} kernel {self.kernel} ({self.variant}) for {target}"


def gated_ops() -> list[str]:
    return sorted(file.stem for file in (Path(__file__).parent / "ops").glob("*.py"))


def gates_of(op: str) -> list[Gate]:
    return list(importlib.import_module(f"tests.budgets.ops.{op}").gates())


def measure_all(ops: Iterable[str]) -> tuple[list[str], list[str]]:
    """The lines of the table, and the sentences of all gates that are violated."""
    rows = [("op", "backend", "kernel", "variant", "target", "registers", "stack", "shared", "dynamic", "instructions")]
    violations = []
    for gate in (gate for op in ops for gate in gates_of(op)):
        for target in gate.targets:
            try:
                found = gate.measure(target)
                instructions = ", ".join(f"{count} {name}" for name, count in found.instructions.items() if count)
                shared = found.static_shared_bytes, found.dynamic_shared_bytes
                cost = map(str, (found.registers, found.stack_bytes, *shared))
                rows.append((gate.op, gate.unit.backend, gate.kernel, gate.variant, target, *cost, instructions))
                gate.check(target)
            except GateViolation as violation:
                violations.append(str(violation))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return lines, violations


def main(ops: list[str]) -> None:
    lines, violations = measure_all(ops or gated_ops())
    print(*lines, sep="\n")
    sys.exit("\n".join(violations) or None)


if __name__ == "__main__":
    # the ops' gates import this module by its name; as __main__ it would be there twice
    importlib.import_module("tests.budgets.gates").main(sys.argv[1:])
