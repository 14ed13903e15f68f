"""Tiers, marks that depend on the machine, and one thread for each process."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the workers and their children share the cores

import torch


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all combinations, and the tests marked long")
    parser.addoption("--quick", action="store_true", help="of the contract, one sample of each op on each runner")


def pytest_configure(config):
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Leave out what this machine cannot run, and what the tier does not ask for."""
    unwanted = {name for name, wanted in _wanted(config).items() if not wanted}
    left_out = [item for item in items if not unwanted.isdisjoint(mark.name for mark in item.iter_markers())]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _wanted(config) -> dict[str, bool]:
    return {"gpu": torch.cuda.is_available(), "long": config.getoption("--full")}


def pytest_report_header(config):
    if not torch.cuda.is_available():
        return "tests marked gpu are deselected: torch sees no NVIDIA card"
    return None
