"""What torch is told of each op: schema, fake kernel, autograd, and the count of its operations."""

import pytest
import torch
from torch.library import opcheck

from fastsd_kernels.dispatch import ops
from tests.contract import covering
from tests.contract.patterns import patterns
from tests.flops import flops_of
from tests.runners import protocol

PATTERNS = [pytest.param(op, name, id=f"{op.name}-{name}") for op in ops() for name in patterns(op)]


@pytest.mark.parametrize(("op", "name"), PATTERNS)
def test_opcheck(op, name):
    opcheck(getattr(torch.ops.fastsd, op.name), (), covering.samples(op, "cpu", torch.float32)[name].kwargs)


@pytest.mark.parametrize(("op", "name"), PATTERNS)
def test_flops_are_those_of_the_definition(op, name, monkeypatch):
    sample = covering.samples(op, "cpu", torch.float32)[name].requiring_grad()
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
