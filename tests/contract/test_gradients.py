"""Gradients of each op against finite differences, in float64."""

import pytest
import torch
from torch import Tensor

import fastsd_kernels
from fastsd_kernels.dispatch import ops
from tests.contract import covering
from tests.contract.patterns import is_smooth, patterns

NAMES = [
    pytest.param(op, name, id=f"{op.name}-{name}", marks=() if name in patterns(op) else pytest.mark.long)
    for op in ops()
    for name, sample in covering.samples(op, "cpu", torch.float64).items()
    if is_smooth(sample)
]


@pytest.mark.parametrize(("op", "name"), NAMES)
def test_gradients(op, name):
    sample = covering.samples(op, "cpu", torch.float64)[name].map_tensors(Tensor.double).requiring_grad()
    tensors = {key: value for key, value in sample.kwargs.items() if isinstance(value, Tensor)}
    others = {key: value for key, value in sample.kwargs.items() if key not in tensors}
    torch.autograd.gradcheck(
        lambda *values: getattr(fastsd_kernels, op.name)(**dict(zip(tensors, values, strict=True)), **others),
        tuple(tensors.values()),
        fast_mode=True,
    )
