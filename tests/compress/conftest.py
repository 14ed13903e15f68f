"""Fixtures of these tests."""

from tests.fixtures import no_gradients, one_thread  # noqa: F401
