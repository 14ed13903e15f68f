"""Fixtures of these tests."""

from tests.processes import one_thread  # noqa: F401
