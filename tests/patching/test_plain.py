"""What is put on a whole class or on the process, not on one module, is kept as well."""

import pytest
from torch import nn

import fastsd
from fastsd import models
from fastsd.nn.plain import why_not_plain
from fastsd_kernels.dispatch import BackendUnavailable


def test_overwritten_class_forward(monkeypatch):
    owner = nn.Module()
    owner.norm = nn.GroupNorm(2, 4)
    assert why_not_plain(owner, "norm", nn.GroupNorm) is None
    monkeypatch.setattr(nn.GroupNorm, "forward", lambda self, x: x)
    assert "GroupNorm.forward has been overwritten" in why_not_plain(owner, "norm", nn.GroupNorm)


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [("numpy", ValueError, "FASTSD_BACKEND: expected one of"), ("cuda", BackendUnavailable, "backend 'cuda'")],
)
def test_backend_of_the_environment_is_checked_first(monkeypatch, value, error, says):
    model = models.load("tiny")
    monkeypatch.setenv("FASTSD_BACKEND", value)
    with pytest.raises(error, match=says):
        fastsd.patch(model)
    assert all(not entry.replaced for entry in fastsd.report(model).entries)
