"""Fixtures of these tests."""

import pytest

from bench import blocks, op
from tests.fixtures import one_thread  # noqa: F401


@pytest.fixture
def known_ceilings(monkeypatch):
    """What a machine can do at best is not measured, which takes seconds."""
    monkeypatch.setattr(op, "copy_ceiling", lambda device: 1e10)
    for command in (op, blocks):
        monkeypatch.setattr(command, "peak", lambda device: 1e11)
