"""What torch is told of each op: schema, fake kernel, autograd, and the count of its operations."""

import pytest
import torch
from torch.library import opcheck

from fastsd_kernels.dispatch import ops
from tests.combinations import covering
from tests.contract.patterns import patterns
from tests.flops import flops_of
from tests.runners import protocol

PATTERNS = [pytest.param(op, name, id=f"{op.name}-{name}") for op in ops() for name in patterns(op)]
# of torch's checks the last takes as long as hundreds of the others
CHECKS, TRACED = ("test_schema", "test_autograd_registration", "test_faketensor"), "test_aot_dispatch_dynamic"


def _to_trace():
    """Patterns, of which `make test` traces enough for each pair of arguments to be given and to be absent."""
    for op in ops():
        given = [tuple(value is not None for value in sample_of(op, name).kwargs.values()) for name in patterns(op)]
        chosen = covering(given)
        for number, name in enumerate(patterns(op)):
            yield pytest.param(op, name, id=f"{op.name}-{name}", marks=() if number in chosen else pytest.mark.long)


def sample_of(op, name):
    return protocol.samples(op, "cpu", torch.float32)[name]


@pytest.mark.parametrize(("op", "name"), PATTERNS)
def test_opcheck(op, name):
    opcheck(getattr(torch.ops.fastsd, op.name), (), sample_of(op, name).kwargs, test_utils=CHECKS)


@pytest.mark.parametrize(("op", "name"), list(_to_trace()))
def test_traced(op, name):
    opcheck(getattr(torch.ops.fastsd, op.name), (), sample_of(op, name).kwargs, test_utils=TRACED)


@pytest.mark.parametrize(("op", "name"), PATTERNS)
def test_flops_are_those_of_the_definition(op, name, monkeypatch):
    sample = sample_of(op, name).requiring_grad()
    reference, given = op.backends["reference"].module, []
    with monkeypatch.context() as patch:
        patch.setattr(reference, "run", lambda *args: given.extend(args) or torch.empty_like(args[0]))
        protocol.call(op, sample, "reference")
    forward = flops_of(lambda: reference.run(*given))
    assert flops_of(lambda: protocol.call(op, sample, None)) == forward
    if not name.startswith("only_bias"):  # torch's norm has no gradient then where a mode looks on
        # the backward pass evaluates the definition again, and differentiates that
        again = flops_of(lambda: reference.run(*given).sum().backward())
        assert flops_of(lambda: protocol.call(op, sample, None).sum().backward()) == forward + again
