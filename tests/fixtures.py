"""Fixtures of several folders of tests, which import them in their conftest.py."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For models that are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_gradients(request):
    """Tests run as inference does, but for those that are marked ``gradients``."""
    with torch.set_grad_enabled(request.node.get_closest_marker("gradients") is not None):
        yield
