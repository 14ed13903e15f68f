"""Kernels are tested on poisoned memory, and a failure says how to repeat it."""

import pytest
import torch

from tests.combinations import seed
from tests.contract import covering
from tests.runners import RUNNERS


@pytest.fixture(autouse=True)
def _poisoned_empty_memory():
    """Whatever torch.empty hands out is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # turns torch.utils.deterministic's filling on
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def pytest_generate_tests(metafunc):
    """``case``: what covers each runner, or everything."""
    if "case" in metafunc.fixturenames:
        choose = _choice(metafunc.config)
        chosen = [case for runner in RUNNERS.values() for case in covering.cases(runner, choose)]
        marks = {"cuda": pytest.mark.gpu}
        metafunc.parametrize(
            "case", [pytest.param(case, id=str(case), marks=marks.get(case.runner.device, ())) for case in chosen]
        )


def _choice(config):
    if config.getoption("--quick"):
        return covering.largest
    return covering.product if config.getoption("--full") else covering.covering


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        report.sections.append(("to repeat it, whatever the commit", f"python -m pytest --full '{item.nodeid}'"))
    return report


def pytest_report_header(config):
    return [
        f"samples: {_choice(config).__name__}, FASTSD_TEST_SEED={seed()}",
        *(f"runner {runner.name}: {why}" for runner in RUNNERS.values() if (why := runner.unavailable())),
    ]
