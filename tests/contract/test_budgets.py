"""What the kernels of every op cost on each target: as the lock has it, with ``--full`` as compilers give it."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile; unset it", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from tests.budgets import lock
from tests.budgets.gates import GateViolation


@pytest.fixture
def full(request):
    return request.config.getoption("--full")


@pytest.mark.parametrize("gate", lock.all_gates(), ids=lambda gate: f"{gate.op}-{gate}")
def test_gate(gate, full):
    failures = []
    for target in gate.targets:
        try:
            gate.check(target, anew=full)
            if full and (difference := lock.read().difference(gate, target, gate.measure(target, anew=True))):
                failures.append(difference)
        except GateViolation as violation:
            failures.append(str(violation))
    assert not failures, "\n".join(failures)


def test_every_entry_of_the_lock_has_a_gate(full):
    if not full:
        pytest.skip("needs --full")
    stale = lock.read().stale(lock.all_gates())
    assert not stale, f"no gate has {', '.join(stale)}; run `{lock.COMMAND}`"
