"""Limits on what the compiled kernels cost, checked on cubins without a GPU.

Each op lists its gates in ``tests/kernels/gates/<op>.py``, in a function ``gates() -> Iterator[Gate]``. A table of them
all, measured, for every target::

    python -m tests.proving.gates [op]
"""

import functools
import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastsd_kernels.cuda_runtime import compile_cubin
from tests.proving import cubin
from tests.proving.cubin import KernelResources
from tests.proving.targets import TARGETS

# What a gate may ask for or forbid: a name for people, and its form in SASS. Blackwell also has 32-byte accesses.
LOAD_16_BYTES = "16-byte load"
COPY_16_BYTES = "16-byte asynchronous copy"
STORE_16_BYTES = "16-byte store"
TENSOR_CORES = "tensor cores"
SPILL = "spill"
INSTRUCTIONS = {
    LOAD_16_BYTES: re.compile(r"\bLDG\.\S*\b(128|256)\b"),
    COPY_16_BYTES: re.compile(r"\bLDGSTS\.\S*\b128\b"),
    STORE_16_BYTES: re.compile(r"\bSTG\.\S*\b(128|256)\b"),
    TENSOR_CORES: re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b"),
    SPILL: re.compile(r"\b(LDL|STL)\b"),
}

# Kernels of one source share a cubin; a gate is asked more than once
cuda_cubin = functools.cache(compile_cubin)
_inspect = functools.cache(cubin.inspect)


class GateViolation(AssertionError):
    """A kernel costs more than its gate allows; the message says where and by how much."""


@dataclass(frozen=True)
class Gate:
    """What one variant of one kernel may cost, on every target.

    Attributes:
        backend: ``"cuda"`` or ``"triton"``.
        kernel: its name in the cubin.
        variant: what the kernel is specialised for, for people.
        compile: target, such as ``"sm_80"``, to cubin.
        registers: at most, per thread.
        static_shared_bytes: at most, per block.
        required, forbidden: names in ``INSTRUCTIONS``.
    """

    op: str
    backend: str
    kernel: str
    variant: str
    compile: Callable[[str], bytes]
    registers: int
    static_shared_bytes: int = 0
    required: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = (SPILL,)

    def __str__(self) -> str:
        return f"{self.backend}-{self.kernel}-{self.variant.replace(' ', '-')}"

    @functools.cache  # noqa: B019 (gates live as long as the process)
    def measure(self, target: str) -> KernelResources:
        """What the kernel costs on ``target``."""
        kernels = _inspect(self.compile(target))
        if self.kernel not in kernels:
            raise GateViolation(f"{self._where(target)}: not in the cubin, which has {', '.join(kernels) or 'nothing'}")
        return kernels[self.kernel]

    def check(self, target: str) -> None:
        """Compile for ``target`` and hold the kernel to the limits.

        Raises:
            GateViolation: naming kernel, target, each limit that is exceeded and the value found.
        """
        found = self.measure(target)
        broken = [
            f"{value} {what}, at most {limit} allowed"
            for what, value, limit in (
                ("registers", found.registers, self.registers),
                ("bytes of stack", found.stack_bytes, 0),
                ("bytes of static shared memory", found.static_shared_bytes, self.static_shared_bytes),
            )
            if value > limit
        ]
        broken += [f"no {name} instruction, at least 1 required" for name in self.required if not count(found, name)]
        broken += [
            f"{count(found, name)} {name} instructions, none allowed" for name in self.forbidden if count(found, name)
        ]
        if broken:
            raise GateViolation(f"{self._where(target)}: {'; '.join(broken)}")

    def _where(self, target: str) -> str:
        return f"{self.op}: {self.backend} kernel {self.kernel} ({self.variant}) for {target}"


def count(resources: KernelResources, name: str) -> int:
    """How many instructions of a kind in ``INSTRUCTIONS`` a kernel has."""
    return sum(INSTRUCTIONS[name].search(line) is not None for line in resources.sass.splitlines())


def gated_ops() -> list[str]:
    folder = Path(__file__).parents[1] / "kernels/gates"
    return sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")


def gates_of(op: str) -> list[Gate]:
    return list(importlib.import_module(f"tests.kernels.gates.{op}").gates())


def measure_all(ops: list[str]) -> tuple[list[str], list[str]]:
    """The lines of the table, and the sentences of all gates that are violated."""
    rows = [("op", "backend", "kernel", "variant", "target", "registers", "stack", "shared", "instructions")]
    violations = []
    for gate in (gate for op in ops for gate in gates_of(op)):
        for target in TARGETS:
            try:
                found = gate.measure(target)
                instructions = ", ".join(f"{count(found, name)} {name}" for name in INSTRUCTIONS if count(found, name))
                cost = map(str, (found.registers, found.stack_bytes, found.static_shared_bytes))
                rows.append((gate.op, gate.backend, gate.kernel, gate.variant, target, *cost, instructions))
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
    importlib.import_module("tests.proving.gates").main(sys.argv[1:])
