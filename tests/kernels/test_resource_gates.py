"""What every op's kernels cost on each target: registers, spills, vector accesses, tensor cores."""

import pytest

from tests.proving.gates import gated_ops, gates_of
from tests.proving.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("gate", [gate for op in gated_ops() for gate in gates_of(op)], ids=str)
def test_gate(gate, target):
    gate.check(target)
