"""Kernels are tested on poisoned memory here too."""

from tests.contract.conftest import _poisoned_empty_memory  # noqa: F401
