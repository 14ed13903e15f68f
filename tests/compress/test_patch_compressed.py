"""patch() on compressed models: every block that a plan leaves runs fused, and computes what it did."""

import copy

import accelerate
import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastsd
from fastsd.compress import recipe
from fastsd.models import example_inputs
from fastsd.nn.cond_conv import CondConv2d
from fastsd.nn.skip import SkippedResnet
from fastsd.patching.report import NO_RULE
from tests.combinations import long
from tests.compress.models import EVERYTHING, PLANS, SMALLEST, build, call, config_of, relative_error, shared, trained


def ops_of(model):
    """How often the model calls each op of this library, and torch's own concatenation."""
    calls = {"cat": 0}

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, target, types, args=(), kwargs=None):
            name = "cat" if target is torch.ops.aten.cat.default else target.name().removeprefix("fastsd::")
            if name == "cat" or target.namespace == "fastsd":
                calls[name] = calls.get(name, 0) + 1
            return target(*args, **kwargs or {})

    with Noting():
        call(model)
    return calls


@pytest.mark.parametrize(
    "name", ["bk-sdm-tiny", "a-sdm", "vega", *long("bk-sdm-base", "bk-sdm-small", "ssd-1b", *PLANS)]
)
def test_as_unpatched_and_nothing_is_left(name):
    small = trained(fastsd.compress(shared(name), PLANS.get(name, name)))
    expected = call(small)
    if name == "a-sdm":
        # patch gives it GRI attention; a window that covers the map is full attention
        fastsd.patch(small, strict=True, gri=fastsd.GRI(window=16, pool=4))
    else:
        fastsd.patch(small, strict=True)
    entries = fastsd.report(small).entries
    assert not [entry for entry in entries if entry.rule is not None and not entry.replaced]
    assert all("Resnet" not in entry.class_name for entry in entries if entry.reason == NO_RULE)
    assert relative_error(call(small), expected) <= 1e-4
    fastsd.unpatch(small)
    assert torch.equal(call(small), expected)


def test_a_sdm_runs_as_fused_as_can_be():
    small = fastsd.patch(fastsd.compress(shared(), "a-sdm"))
    calls = ops_of(small)
    assert calls["cond_conv2d"] == 5
    assert calls["gri_attention"] == 3
    # 19 whole blocks; in the three of the pruned levels a plain conv1 and two shortcuts, none for down_blocks.0
    whole = sum(type(module).__name__ == "ResnetBlock2D" for module in small.modules()) - 3
    assert calls["resnet_block"] == whole


def test_gri_comes_from_the_plan():
    small = fastsd.compress(shared(), "a-sdm")
    exact = call(small)
    fastsd.patch(small)
    assert len([entry for entry in fastsd.report(small).entries if entry.approximate]) == 3
    pruned = fastsd.Plan(recipe("a-sdm", config_of(shared())).removed)
    by_hand = fastsd.patch(fastsd.compress(shared(), pruned), gri=fastsd.GRI(16, 4))
    assert relative_error(call(small), call(by_hand)) <= 1e-4
    fastsd.patch(small, gri=fastsd.GRI(window=4, pool=2))
    other = call(small)
    assert relative_error(other, exact) > 1e-4
    assert torch.equal(call(fastsd.patch(small)), other)  # what is chosen stays
    assert relative_error(call(fastsd.patch(fastsd.unpatch(small), rules=["resnet_block"])), exact) <= 1e-5


def test_shortcuts_read_both_maps_where_they_are():
    plan = fastsd.Plan(bypassed=tuple(f"up_blocks.0.resnets.{layer}" for layer in range(3)))
    small = fastsd.compress(shared(), plan)
    expected, stock = call(small), ops_of(small)
    assert stock["cat"] >= 12
    fastsd.patch(small)
    calls = ops_of(small)
    assert calls["resnet_block"] == 22
    assert stock["cat"] - calls["cat"] == 12  # one for each of the residual blocks of up-blocks
    assert relative_error(call(small), expected) <= 1e-4


def test_skipped_blocks_called_alone():
    small = fastsd.patch(fastsd.compress(shared(), PLANS["bypassed"]))
    block = small.up_blocks[3].resnets[2]
    assert isinstance(block, SkippedResnet)
    x, skip = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    expected = block.conv_shortcut(torch.cat([x, skip], 1))
    torch.testing.assert_close(block(x, None, skip=skip), expected)
    torch.testing.assert_close(block(torch.cat([x, skip], 1), None), expected)
    seen = []
    block.conv_shortcut.register_forward_hook(lambda *args: seen.append(1))
    torch.testing.assert_close(block(x, None, skip=skip), expected)
    assert seen == [1]


def test_what_is_put_on_a_mixing_convolution_runs():
    expected = trained(fastsd.compress(shared(), PLANS["experts"]))
    small = fastsd.patch(copy.deepcopy(expected))
    conv = small.up_blocks[1].resnets[0].conv2
    assert ops_of(small)["cond_conv2d"] == 1
    seen = []
    for module in (conv, conv.routing):
        handle = module.register_forward_hook(lambda module, args, y: seen.append(type(module)))
        assert relative_error(call(small), call(expected)) <= 1e-4
        handle.remove()
    assert seen == [CondConv2d, nn.Linear]
    conv.routing.weight.data.mul_(3)
    expected.up_blocks[1].resnets[0].conv2.routing.weight.data.mul_(3)
    assert relative_error(call(small), call(expected)) <= 1e-4


@pytest.mark.parametrize("is_patched", [False, True])
def test_offloaded_and_cast(is_patched):
    """What moves or casts weights around each call does so for a routing, too."""
    small = trained(fastsd.compress(shared(), PLANS["experts"]))
    inputs = example_inputs(small, 2, 16, tokens=7)
    expected = small(**inputs)[0]
    offloaded = accelerate.cpu_offload(copy.deepcopy(small), execution_device=torch.device("cpu"))
    cast = copy.deepcopy(small)
    cast.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert cast.up_blocks[1].resnets[0].conv2.routing.weight.dtype == torch.float8_e4m3fn
    for model, error in ((offloaded, 1e-4), (cast, 0.2)):
        if is_patched:
            fastsd.patch(model)
        assert relative_error(model(**inputs)[0], expected) <= error


@pytest.mark.gradients
def test_gradients_as_unpatched():
    small = fastsd.compress(shared(), "a-sdm").train()
    gradients = []
    for model in (copy.deepcopy(small), fastsd.patch(copy.deepcopy(small), gri=fastsd.GRI(16, 4))):
        model(**example_inputs(model, 2, 16, tokens=7))[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in gradients[0].items():
        assert relative_error(gradients[1][name], grad) <= 1e-3, name
        # a routing that never moves would be no routing
        assert "routing" not in name or grad.abs().max() > 0


def test_compiled():
    """Every kind of module that a plan makes, in one graph."""
    small = fastsd.patch(fastsd.compress(build(SMALLEST), EVERYTHING))
    calls, expected = ops_of(small), call(small)
    assert min(calls[name] for name in ("cond_conv2d", "gri_attention", "resnet_block")) > 0
    torch._dynamo.reset()
    small.compile(fullgraph=True, backend="aot_eager")
    assert relative_error(call(small), expected) <= 1e-4
    torch._dynamo.reset()


def test_lora():
    """On attention it goes as on any model; peft says of a mixing convolution that it does not know it."""
    expected = fastsd.compress(shared(), "a-sdm")
    small = fastsd.patch(copy.deepcopy(expected), gri=fastsd.GRI(16, 4))
    for model in (expected, small):
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert relative_error(call(small), call(expected)) <= 1e-4
    with pytest.raises(ValueError, match=r"(?s)Target module CondConv2d\(.*is not supported"):
        small.add_adapter(LoraConfig(r=2, target_modules=["up_blocks.3.resnets.0.conv2"]), "other")
