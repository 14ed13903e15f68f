"""Every op on every runner: within the numerical contract, and the same bits whatever must not matter."""

import pytest

from fastsd_kernels.dispatch import ops
from tests.combinations import order
from tests.contract.check import check
from tests.runners import RUNNERS


def test_contract(case):
    check(case.op, case.runner, case.sample, case.setting)


LARGE = [
    pytest.param(op, runner, marks=pytest.mark.gpu if runner.device == "cuda" else (), id=f"{op.name}-{runner.name}")
    for runner in RUNNERS.values()
    if runner.name not in ("interpreter", "host")  # where test_launches looks at the grid
    for op in ops()
]


@pytest.mark.parametrize(("op", "runner"), LARGE)
def test_large_batches(op, runner, request):
    setting = {name: values[-1] for name, values in runner.settings.items()}
    one = order(op.name, runner.name) % len(runner.dtypes)
    for dtype in runner.dtypes if request.config.getoption("--full") else runner.dtypes[one : one + 1]:
        for sample in op.cases.large_samples(runner.device, dtype):
            check(op, runner, sample, setting)
