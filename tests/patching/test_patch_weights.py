"""Rows 2, 3, 4, 7 and 9 of the compatibility matrix: leaves, weights, dtypes, gradients and inputs after a patch."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.autograd import forward_ad

import fastsd
from fastsd.models import example_inputs
from tests.combinations import each_value
from tests.patching.models import NAMES, assert_as_stock, blocks, build, call, op_calls, relative_error


@pytest.mark.parametrize("name", NAMES)
def test_row_2_leaves_stay_stock(name):
    """PEFT and layerwise casting look for leaves by type, and find the same modules as before."""
    model = build(name)
    leaves = [(path, type(module), module) for path, module in model.named_modules() if not list(module.children())]
    fastsd.patch(model)
    found = [(path, type(module), module) for path, module in model.named_modules() if not list(module.children())]
    assert found == leaves


def _in_place(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def _load_state_dict(assign, model):
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()}, assign=assign)


def _new_leaf(model):
    torch.manual_seed(1)
    for block in blocks(model):
        block.norm2 = nn.GroupNorm(2, block.norm2.num_channels)
        block.conv1 = nn.Conv2d(block.conv1.in_channels, block.conv1.out_channels, 3, padding=1)


def _new_parameter(model):
    for block in blocks(model):
        block.norm1.weight = nn.Parameter(block.norm1.weight * 2)


def _new_attributes(model):
    for block in blocks(model):
        block.output_scale_factor = 1.7
        block.norm1.eps = 0.5
        block.dropout.p = 0.0


@pytest.mark.parametrize(
    "change",
    [
        _in_place,
        lambda model: _load_state_dict(False, model),
        lambda model: _load_state_dict(True, model),
        _new_leaf,
        _new_parameter,
        _new_attributes,
    ],
    ids=["in_place", "load_state_dict", "load_state_dict_assign", "new_leaf", "new_parameter", "new_attributes"],
)
def test_row_3_weights_change(change):
    stock, model = build(), fastsd.patch(build())
    assert_as_stock(call(model), call(stock))
    change(stock)
    change(model)
    assert relative_error(call(stock), call(build())) > 1e-3
    assert_as_stock(call(model), call(stock))
    assert op_calls(lambda: call(model)) == 16
    assert torch.equal(call(fastsd.unpatch(model)), call(stock))


@each_value("dtype,name", [torch.float16, torch.bfloat16, torch.float64], ["unet", "scale_shift", "vae"])
def test_row_4_cast_after_patch(dtype, name):
    model = fastsd.patch(build(name)).to(dtype)
    exact = call(build(name).to(dtype).double(), rounded_to=dtype)
    stock = call(build(name).to(dtype))
    assert relative_error(call(model), exact) <= 1.5 * relative_error(stock, exact) + 1e-12
    assert torch.equal(call(fastsd.unpatch(model)), stock)


def test_row_4_half_and_back():
    model = fastsd.patch(build())
    rounded = build().half().float()
    assert_as_stock(call(model.half().float()), call(rounded))


def test_row_4_device():
    """To the meta device, where nothing computes, and to memory again."""
    model = fastsd.patch(build())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta")
    assert model(**example_inputs(model, 2, 16, tokens=7))[0].device.type == "meta"
    model.to_empty(device="cpu").load_state_dict(state)
    assert_as_stock(call(model), call(build()))


def gradients(model, seed=0, steps=1):
    """The gradients of every parameter after some steps of training, and of the input."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        inputs = example_inputs(model, 2, 16, tokens=7)
        inputs["sample"].requires_grad_()
        model(**inputs)[0].square().mean().backward()
        optimizer.step()
    return {"sample": inputs["sample"].grad} | {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(actual, expected):
    scale = torch.stack([value.norm() for value in expected.values() if value is not None]).max()
    for name, value in expected.items():
        assert (actual[name] is None) == (value is None), name
        if value is not None:
            assert (actual[name] - value).norm() <= 1e-4 * value.norm() + 1e-6 * scale, name


@each_value("name,checkpointing", ["unet", "scale_shift", "resnet_sampling", "dropout"], [False, True])
@pytest.mark.gradients
def test_row_7_training(name, checkpointing):
    results = []
    for prepare in (lambda model: model, fastsd.patch):
        model = prepare(build(name)).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        results.append(gradients(model, steps=2))
    assert_same_gradients(results[1], results[0])


@pytest.mark.gradients
def test_row_7_runs_the_op_in_training():
    model = fastsd.patch(build()).train()
    seen = set()
    output = model(**example_inputs(model, 2, 16, tokens=7))[0]
    nodes = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    assert sum("fastsd_group_norm_silu" in node.name() for node in seen) == 16 + 4


@pytest.mark.gradients
def test_row_7_frozen_and_partly_trained():
    results = []
    for prepare in (lambda model: model, fastsd.patch):
        model = prepare(build()).requires_grad_(False)
        model.mid_block.resnets[0].norm2.requires_grad_(True)
        model.mid_block.resnets[0].time_emb_proj.requires_grad_(True)
        results.append(gradients(model))
    assert results[0]["mid_block.resnets.0.norm2.weight"] is not None
    assert_same_gradients(results[1], results[0])


@pytest.mark.gradients
def test_row_7_ema_and_deepcopy_in_training():
    """An exponential moving average copies the model: the copy trains as stock."""
    model = fastsd.patch(build()).train()
    assert_same_gradients(gradients(copy.deepcopy(model)), gradients(build().train()))


@pytest.mark.parametrize("transform", ["grad", "jvp", "dual", "vmap"])
@pytest.mark.gradients
def test_row_7_function_transforms(transform):
    """The op has no rule for torch.func; the blocks run their stock forward under it."""
    x, v = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    context = torch.randn(2, 7, 8)

    def run(model):
        def f(sample):
            return model(sample, 5, context[: len(sample)]).sample

        if transform == "grad":
            return torch.func.grad(lambda sample: f(sample).square().sum())(x)
        if transform == "jvp":
            return torch.func.jvp(f, (x,), (v,))[1]
        if transform == "vmap":
            return torch.func.vmap(lambda sample: f(sample[None])[0])(x)
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent

    model = build()
    # attention from matmul and softmax, which every transform can differentiate
    model.set_attn_processor(AttnProcessor())
    stock = run(model)
    assert_as_stock(run(fastsd.patch(model)).double(), stock.double())


def test_row_7_functional_call():
    """Plain tensors in the place of parameters are read like them."""
    model = build()
    weights = {name: parameter * 1.1 for name, parameter in model.named_parameters()}
    inputs = example_inputs(model, 2, 16, tokens=7)

    def run():
        return torch.func.functional_call(model, weights, (), inputs)[0].double()

    stock = run()
    fastsd.patch(model)
    assert_as_stock(run(), stock)
    assert op_calls(run) == 16


@pytest.mark.parametrize(
    "name", ["unet", "scale_shift", "nine_channels", "eight_channels", "no_mid_block", "controlnet"]
)
def test_row_9_sizes_that_change(name):
    """Batch 1 to 8, odd latents, one model."""
    model = build(name)
    sizes = [(1, 16), (2, 16), (8, 6), (3, 13), (1, 7), (2, 16)]
    stock = [call(model, batch, latent) for batch, latent in sizes]
    fastsd.patch(model, strict=True)
    for (batch, latent), expected in zip(sizes, stock, strict=True):
        assert_as_stock(call(model, batch, latent), expected)


def test_row_9_not_square():
    model = build()
    inputs = {"sample": torch.randn(2, 4, 9, 22)}
    stock = call(model, **inputs)
    assert_as_stock(call(fastsd.patch(model), **inputs), stock)


def test_row_9_strided_inputs():
    model = build()
    samples = (
        torch.randn(2, 4, 16, 32)[..., ::2],
        torch.randn(2, 16, 16, 4).permute(0, 3, 1, 2),
        torch.randn(1, 4, 16, 16).expand(2, 4, 16, 16),
        torch.randn(3, 4, 16, 16)[1:],
    )
    stock = [call(model, sample=sample) for sample in samples]
    fastsd.patch(model)
    for sample, expected in zip(samples, stock, strict=True):
        assert_as_stock(call(model, sample=sample), expected)
