"""Fixtures of the patching tests."""

import importlib
import pkgutil
from typing import ClassVar

import pytest

from fastsd import nn
from fastsd.nn import frozen, graphs
from fastsd_kernels.linear import cpu_speed
from tests.combinations import choose_one_of
from tests.fixtures import no_gradients, one_thread  # noqa: F401
from tests.patching.tape import Tape

# These modules keep what classes of diffusers have at their import: it is not to be what a test has put there.
for _module in pkgutil.iter_modules(nn.__path__):
    importlib.import_module(f"fastsd.nn.{_module.name}")

# What must hold whichever product linear layers run through: the rows of docs/compatibility.md. `make test` runs each
# test with one of the two.
EITHER_PRODUCT = (
    "test_patch_adapters",
    "test_patch_compile",
    "test_patch_copies",
    "test_patch_exact",
    "test_patch_hooks",
    "test_patch_text",
    "test_patch_verbs",
    "test_patch_weights",
)
PRODUCTS = ("torchs_product", "own_product")


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__.rpartition(".")[2] in EITHER_PRODUCT:
        metafunc.parametrize("_measured_speed", [False, True], ids=PRODUCTS, indirect=True)


def pytest_collection_modifyitems(items):
    either = [item for item in items if hasattr(item, "callspec") and "_measured_speed" in item.callspec.params]
    choose_one_of(either, PRODUCTS)


@pytest.fixture(autouse=True)
def _measured_speed(request, monkeypatch):
    """What is replaced by what must not depend on the processor; EITHER_PRODUCT and others try the other case."""
    monkeypatch.setattr(cpu_speed, "_is_faster", getattr(request, "param", False))


@pytest.fixture
def _own_product(monkeypatch, _measured_speed):
    """As on a processor that torch's products are slow on."""
    monkeypatch.setattr(cpu_speed, "_is_faster", True)


@pytest.fixture(autouse=True)
def _no_backend_from_the_environment(monkeypatch):
    monkeypatch.delenv("FASTSD_BACKEND", raising=False)


@pytest.fixture
def tape(monkeypatch, request):
    """CUDA graphs are recorded on a :class:`Tape`, at the first call of a shape; what happened on all of them.

    The code of the tests counts as known.
    """

    class Own(Tape):
        made: ClassVar = []

    monkeypatch.setattr(graphs, "Card", Own)
    monkeypatch.setattr(frozen, "_KNOWN", frozen._KNOWN | {"conftest", "tests", request.module.__name__})
    monkeypatch.setattr(graphs, "EAGER_CALLS", 0)
    return Own
