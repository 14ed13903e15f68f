"""What group_norm_silu's kernels cost on each target: registers, spills, vector loads and stores."""

import pytest

from tests.proving.gates import gates_of
from tests.proving.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("gate", gates_of("group_norm_silu"), ids=str)
def test_gate(gate, target):
    gate.check(target)
