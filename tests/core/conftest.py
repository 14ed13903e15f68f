"""The kernels are tested on poisoned memory."""

from tests.contract.conftest import _poisoned_empty_memory  # noqa: F401
