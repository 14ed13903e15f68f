"""Fixtures of the patching tests."""

import pytest
import torch

from fastsd_kernels.linear import cpu_speed


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_measured_speed(monkeypatch):
    """What is replaced by what must not depend on the processor; test_patch_feed_forward.py tries the other case."""
    monkeypatch.setattr(cpu_speed, "_is_faster", False)


@pytest.fixture(autouse=True)
def _no_backend_from_the_environment(monkeypatch):
    monkeypatch.delenv("FASTSD_BACKEND", raising=False)
