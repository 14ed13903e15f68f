"""Kernels are tested on poisoned memory: whatever torch.empty hands out is full of NaN."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_empty_memory():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # turns torch.utils.deterministic's filling on
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)
