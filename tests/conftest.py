"""Marks that depend on the machine."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="everything, also what takes minutes and seldom fails")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA card")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
