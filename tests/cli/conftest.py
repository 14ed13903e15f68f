"""Fixtures of these tests."""

from tests.fixtures import one_thread  # noqa: F401
