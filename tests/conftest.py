"""Which tests are run: those marked ``long`` with ``--full`` only, those marked ``gpu`` where there is a card."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests marked long")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    left = set() if config.getoption("full") else {"long"}
    left |= set() if torch.cuda.is_available() else {"gpu"}
    deselected = [item for item in items if not left.isdisjoint(item.keywords)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if left.isdisjoint(item.keywords)]
