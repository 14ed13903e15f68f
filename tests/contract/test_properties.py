"""Shapes and strides that a search finds: whatever they are, the CPU's result is within the contract."""

import hypothesis.strategies as st
import torch
from hypothesis import given, seed
from torch import Tensor

from fastsd_kernels.dispatch import ops
from fastsd_kernels.testing import Sample
from fastsd_kernels.testing.inputs import random_tensor
from tests.combinations import order
from tests.contract import covering
from tests.contract.check import check
from tests.contract.patterns import patterns
from tests.runners import RUNNERS

RUNNER = RUNNERS["cpu"]
BY_NAME = {op.name: op for op in ops()}


@st.composite
def setting(draw):
    return {name: draw(st.sampled_from(values)) for name, values in RUNNER.settings.items()}


@st.composite
def laid_out(draw, x: Tensor) -> Tensor:
    """The same values in any order of dimensions, with gaps between them, at any offset."""
    order = draw(st.permutations(range(x.dim())))
    steps = [draw(st.integers(1, 2)) for _ in order]
    gaps = [draw(st.integers(0, 3)) for _ in order]
    offset = draw(st.integers(0, 5))
    stride, strides = 1, [0] * x.dim()
    for axis in order:
        strides[axis] = stride * steps[axis]
        stride = strides[axis] * x.shape[axis] + gaps[axis]
    memory = torch.full((offset + max(stride, 1),), torch.nan, dtype=x.dtype)
    return memory.as_strided(x.shape, strides, offset).copy_(x)


@seed(order(__name__))
@given(st.data())
def test_strides(data):
    op = data.draw(st.sampled_from(ops()))
    dtype = data.draw(st.sampled_from(RUNNER.dtypes))
    name = data.draw(st.sampled_from([n for n in patterns(op) if n in covering.served(op, RUNNER, dtype)]))
    sample = covering.samples(op, "cpu", dtype)[name]
    sample = sample.map_tensors(lambda x: data.draw(laid_out(x)))
    check(op, RUNNER, sample, data.draw(setting()))


@st.composite
def linears(draw, **like):
    rows, channels, features = draw(st.integers(0, 70)), draw(st.integers(1, 140)), draw(st.integers(1, 140))
    activation = draw(st.sampled_from(("none", "gelu", "quick_gelu", "geglu")))
    width = features * (1 + (activation == "geglu"))
    kwargs = {"x": random_tensor((rows, channels), **like), "activation": activation}
    kwargs["weight"] = random_tensor((width, channels), **like, seed=5) * channels**-0.5
    if draw(st.booleans()):
        kwargs |= {"norm_eps": 1e-5, "norm_weight": random_tensor((channels,), **like, seed=1)}
    if draw(st.booleans()):
        kwargs["bias"] = random_tensor((width,), **like, seed=6)
    if draw(st.booleans()):
        kwargs["residual"] = random_tensor((rows, features), **like, seed=8)
    return kwargs


@st.composite
def attentions(draw, **like):
    batch, heads, width = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 96))
    queries, keys = draw(st.integers(1, 150)), draw(st.integers(1, 300))
    sizes = {"q": queries, "k": keys, "v": keys}
    drawn = {
        n: random_tensor((batch, heads, size, width), **like, seed=number)
        for number, (n, size) in enumerate(sizes.items())
    }
    return drawn | ({"bias": random_tensor((batch, keys), **like, seed=4)} if draw(st.booleans()) else {})


@st.composite
def group_norms(draw, **like):
    groups, wide = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    shape = (draw(st.integers(1, 3)), groups * wide, draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    x = random_tensor(shape, **like)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    kwargs = {"x": x, "num_groups": groups, "activation": draw(st.sampled_from(("none", "silu")))}
    if draw(st.booleans()):
        kwargs |= {name: random_tensor((shape[1],), **like, seed=at) for at, name in enumerate(("weight", "bias"))}
    return kwargs


@st.composite
def convolutions(draw, **like):
    kernel, stride = draw(st.sampled_from((1, 3))), draw(st.integers(1, 2))
    groups, wide, out = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(st.integers(1, 70))
    height, width = draw(st.integers(3, 24)), draw(st.integers(3, 24))
    x = random_tensor((draw(st.integers(1, 2)), groups * wide, height, width), **like)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    weight = random_tensor((out, groups * wide, kernel, kernel), **like, seed=5) / (groups * wide * kernel**2) ** 0.5
    kwargs = {"x": x, "weight": weight, "stride": stride, "padding": draw(st.integers(0, 2))}
    if draw(st.booleans()):
        kwargs |= {"num_groups": groups, "activation": draw(st.sampled_from(("none", "silu")))}
    return kwargs | ({"bias": random_tensor((out,), **like, seed=6)} if draw(st.booleans()) else {})


SHAPES = {"linear": linears, "attention": attentions, "group_norm_silu": group_norms, "conv2d": convolutions}


@seed(order(__name__))
@given(st.data())
def test_shapes(data):
    name = data.draw(st.sampled_from(sorted(SHAPES)))
    dtype = data.draw(st.sampled_from(RUNNER.dtypes))
    kwargs = data.draw(SHAPES[name](device="cpu", dtype=dtype))
    check(BY_NAME[name], RUNNER, Sample("drawn", kwargs), data.draw(setting()))
