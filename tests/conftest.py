"""Tiers, marks that depend on the machine, one thread for each process, and how long a property is searched."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the workers and their children share the cores

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all combinations, and the tests marked long")
    parser.addoption("--quick", action="store_true", help="of the contract, one sample of each op on each runner")


def pytest_configure(config):
    torch.set_num_threads(1)
    is_full = config.getoption("--full")
    settings.register_profile(
        "fastsd",
        max_examples=200 if is_full else 20,
        phases=[Phase.explicit, Phase.generate, *[Phase.shrink] * is_full],  # to shrink takes minutes
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("fastsd")


@pytest.hookimpl(trylast=True)  # after those that mark items
def pytest_collection_modifyitems(config, items):
    """Leave out what this machine cannot run, and what the tier does not ask for."""
    unwanted = set() if config.getoption("--full") else {"long"}
    unwanted |= set() if torch.cuda.is_available() else {"gpu"}
    left_out = [item for item in items if not unwanted.isdisjoint(mark.name for mark in item.iter_markers())]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


def pytest_report_header(config):
    return None if torch.cuda.is_available() else "tests marked gpu are deselected: torch sees no NVIDIA card"
