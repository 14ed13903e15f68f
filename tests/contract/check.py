"""Hold a runner to the contract of an op."""

from itertools import product

import torch

from fastsd_kernels.dispatch import Op
from fastsd_kernels.testing import Sample, check_result
from tests.runners.protocol import Runner, Setting


def check(op: Op, runner: Runner, sample: Sample, setting: Setting) -> None:
    """Run a sample, twice where that may give other bits, and hold the result to the numerical contract."""
    actual = runner.run(op, sample, setting)
    check_result(op, sample, actual)
    other = runner.same_bits(setting)
    if other is not None:
        torch.testing.assert_close(runner.run(op, sample, other), actual, rtol=0, atol=0, equal_nan=True)


def check_all(op: Op, runner: Runner, sample: Sample) -> None:
    """:func:`check` in every setting of the runner: for samples that are an op's own, beside its ``cases.py``."""
    for values in product(*runner.settings.values()):
        check(op, runner, sample, dict(zip(runner.settings, values, strict=True)))


def check_threads(op: Op, runner: Runner, sample: Sample) -> None:
    """Hold a sample to the contract on the CPU, and to the same bits with any number of threads.

    For ops whose products are all the library's own.
    """
    one, *others = (
        runner.run(op, sample, {"isa": runner.settings["isa"][-1], "threads": threads}) for threads in (1, 2, 3)
    )
    check_result(op, sample, one)
    for other in others:
        torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)
