"""Every op on every runner: within the numerical contract, and the same bits whatever must not matter."""

import pytest
import torch

from fastsd_kernels.dispatch import ops
from tests.combinations import order
from tests.contract import covering
from tests.contract.check import check, check_all
from tests.runners import RUNNERS, protocol


def test_contract(case):
    check(case.op, case.runner, case.sample, case.setting)


MARKS = {"cuda": "gpu", "cpu": "long"}
LARGE = [
    # a CPU has no grid
    pytest.param(op, runner, marks=getattr(pytest.mark, MARKS[runner.device]), id=f"{op.name}-{runner.name}")
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


@pytest.mark.parametrize("op", ops(), ids=lambda op: f"{op.name}-cpu")
def test_offsets_of_more_than_32_bits(op, tmp_path):
    """Two items of a batch that lie 2³² elements apart, in a file of which only these are written."""
    runner, samples = RUNNERS["cpu"], protocol.samples(op, "cpu", torch.float32)
    sample = next(sample for name, sample in samples.items() if name.endswith("contiguous"))
    x = covering.first_tensor(sample)
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=2**32 + x.numel(), dtype=x.dtype)
    far = memory.as_strided(x.shape, (2**32, *x.stride()[1:])).copy_(x)
    check_all(op, runner, sample.map_tensors(lambda tensor: far if tensor is x else tensor))
