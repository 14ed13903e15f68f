"""Feed-forward layers: projections as the op where that is faster, the leaf itself where more is asked."""

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn
from torch._subclasses import FakeTensorMode

import fastsd
from fastsd_kernels.linear import cpu_speed
from tests.patching.models import assert_as_stock, build, call, calls_of

pytestmark = pytest.mark.usefixtures("_own_product")


def layer(**changes):
    torch.manual_seed(0)
    return nn.ModuleList([FeedForward(**{"dim": 24} | changes)]).eval()


def tokens(count=7, dtype=torch.float32):
    return torch.randn(2, count, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("activation", ["geglu", "gelu", "gelu-approximate", "geglu-approximate", "swiglu"])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_as_stock(activation, count):
    model = layer(activation_fn=activation)
    stock = model[0](tokens(count))
    fast = fastsd.patch(model, strict=True)[0](tokens(count))
    assert fast.stride() == stock.stride()
    torch.testing.assert_close(fast, stock, rtol=1e-5, atol=1e-6)
    assert torch.equal(fastsd.unpatch(model)[0](tokens(count)), stock)


def test_both_projections_are_the_op():
    model = fastsd.patch(layer())
    assert calls_of("linear", lambda: model[0](tokens())) == 2


def test_without_a_faster_product_torch_multiplies(monkeypatch):
    monkeypatch.setattr(cpu_speed, "_is_faster", False)
    model = layer()
    stock = model[0](tokens())
    fastsd.patch(model)
    assert calls_of("linear", lambda: model[0](tokens())) == 0
    assert torch.equal(model[0](tokens()), stock)


def test_patching_measures(monkeypatch):
    monkeypatch.setattr(cpu_speed, "_is_faster", None)
    monkeypatch.setattr(cpu_speed, "_ratio", lambda: 1.3)
    fastsd.patch(layer())
    assert cpu_speed.is_faster()
    monkeypatch.setattr(cpu_speed, "_ratio", lambda: 0.5)
    fastsd.patch(layer())
    assert cpu_speed.is_faster()  # once in a process, so that results do not change


def test_measuring_leaves_no_trace():
    before = torch.get_rng_state()
    assert cpu_speed._ratio() > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_measured_by_tensors_that_are_fake(monkeypatch):
    monkeypatch.setattr(cpu_speed, "_is_faster", None)
    monkeypatch.setattr(cpu_speed, "_ratio", lambda: 1.3)
    with FakeTensorMode():
        assert not cpu_speed.measure()
    assert cpu_speed._is_faster is None
    assert cpu_speed.is_faster()  # the first that asks has it measured


def test_measuring_leaves_the_number_of_threads(monkeypatch):
    """It is the process's: what changes it for a moment changes it for good in a thread that starts meanwhile."""
    monkeypatch.setattr(torch, "set_num_threads", None)
    assert cpu_speed._ratio() > 0


def test_weights_that_are_sparse_are_torchs():
    results = []
    for prepare in (lambda model: model, fastsd.patch):
        model = prepare(layer())
        model[0].net[2].weight = nn.Parameter(model[0].net[2].weight.detach().to_sparse_csr(), requires_grad=False)
        results.append(model[0](tokens()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_strided_tokens():
    tokens = torch.randn(24, 7, 2).permute(2, 1, 0)
    stock = layer()[0](tokens)
    fast = fastsd.patch(layer())[0](tokens)
    assert fast.stride() == stock.stride()
    torch.testing.assert_close(fast, stock, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{"dropout": 0.5}, {"dropout": 0.5, "final_dropout": True}, {"bias": False}])
@pytest.mark.gradients
def test_options(changes):
    outputs = []
    for prepare in (lambda model: model, fastsd.patch):
        model = prepare(layer(**changes)).train()
        torch.manual_seed(2)
        with torch.no_grad():
            outputs.append(model[0](tokens()))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


def test_weights_are_read_live():
    model = fastsd.patch(layer())
    model[0](tokens())
    model[0].net[2].weight.data.mul_(2)
    stock = layer()
    stock[0].net[2].weight.mul_(2)
    torch.testing.assert_close(model[0](tokens()), stock[0](tokens()), rtol=1e-5, atol=1e-6)


def test_in_a_model():
    stock = call(build())
    model = fastsd.patch(build(), strict=True)
    assert_as_stock(call(model), stock)
    # four blocks, with two attentions of four projections each and one layer of two
    assert calls_of("linear", lambda: call(model)) == 4 * (2 * 4 + 2)
