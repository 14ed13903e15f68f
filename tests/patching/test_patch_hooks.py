"""Row 5 of the compatibility matrix: hooks, offloading, casting and anything else that only a call of a leaf runs."""

import functools

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn.utils import parametrize

import fastsd
from fastsd.models import example_inputs
from tests.patching.models import assert_as_stock, blocks, build, call, op_calls, relative_error

TRIPLE = 3.0


class _Triple(nn.Module):
    def forward(self, weight):
        return TRIPLE * weight


def _triple_output(module, args, output):
    return TRIPLE * output


def _triple_input(module, args):
    return tuple(TRIPLE * arg for arg in args)


class _TripleHook(ModelHook):
    def post_forward(self, module, output):
        return TRIPLE * output


def _instance_forward(module):
    stock = module.forward
    module.forward = functools.wraps(stock)(lambda *args: TRIPLE * stock(*args))


def _parametrize(norm):
    parametrize.register_parametrization(norm, "weight", _Triple())


# name: what is put on, where in a block, how many of the two ops of that block are still called
PUT_ON = {
    "forward_hook": (lambda leaf: leaf.register_forward_hook(_triple_output), "norm1", 0),
    "forward_pre_hook": (lambda leaf: leaf.register_forward_pre_hook(_triple_input), "nonlinearity", 0),
    "instance_forward": (_instance_forward, "norm2", 0),
    "accelerate_hook": (lambda leaf: add_hook_to_module(leaf, _TripleHook()), "norm2", 0),
    "parametrization": (_parametrize, "norm1", 0),
    "hook_on_a_convolution": (lambda leaf: leaf.register_forward_hook(_triple_output), "conv1", 2),
    "accelerate_hook_on_a_convolution": (lambda leaf: add_hook_to_module(leaf, _TripleHook()), "conv2", 2),
    "hook_on_dropout": (lambda leaf: leaf.register_forward_hook(_triple_output), "dropout", 2),
    "hook_on_the_projection": (lambda leaf: leaf.register_forward_pre_hook(_triple_input), "time_emb_proj", 2),
    "parametrized_convolution": (_parametrize, "conv2", 2),
    "hook_on_the_block": (lambda block: block.register_forward_hook(_triple_output), None, 2),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", PUT_ON)
@pytest.mark.filterwarnings("ignore:fastsd.patch left")
def test_row_5_put_on_a_leaf(name, when):
    put_on, leaf, fast_calls = PUT_ON[name]
    stock, model = build(), build()
    base = call(stock)
    if when == "after":
        fastsd.patch(model)
    for each in (stock, model):
        block = each.mid_block.resnets[1]
        put_on(getattr(block, leaf) if leaf else block)
    fastsd.patch(model)
    assert relative_error(call(stock), base) > 1e-3
    assert_as_stock(call(model), call(stock))
    assert op_calls(lambda: call(model)) == 14 + fast_calls
    (entry,) = (entry for entry in fastsd.report(model).entries if entry.path == "mid_block.resnets.1")
    assert (entry.reason is None) == bool(fast_calls)
    fastsd.unpatch(model)
    assert torch.equal(call(model), call(stock))


def test_row_5_removed_hook():
    """What a removed hook leaves behind does not slow the block down."""
    model = build()
    norm = model.mid_block.resnets[0].norm1
    expected = call(model)
    add_hook_to_module(norm, _TripleHook())
    remove_hook_from_module(norm)
    assert "forward" in vars(norm)
    fastsd.patch(model, strict=True)
    assert_as_stock(call(model), expected)
    assert op_calls(lambda: call(model)) == 16
    handle = norm.register_forward_hook(_triple_output)
    assert op_calls(lambda: call(model)) == 14
    handle.remove()
    assert op_calls(lambda: call(model)) == 16


def test_row_5_hook_on_all_modules():
    model = fastsd.patch(build())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        assert op_calls(lambda: call(model)) == 0
    finally:
        handle.remove()
    assert all(block.norm1 in seen and block.nonlinearity in seen for block in blocks(model))
    assert op_calls(lambda: call(model)) == 16


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.gradients
def test_row_5_backward_hook(register):
    model = fastsd.patch(build())
    seen = []
    getattr(model.mid_block.resnets[0].norm1, register)(lambda module, *gradients: seen.append(module))
    model(**example_inputs(model, 2, 16, tokens=7))[0].sum().backward()
    assert seen == [model.mid_block.resnets[0].norm1]


def test_row_5_block_with_an_instance_forward():
    """A block that something else has taken over is left to it."""
    model = build()
    base = call(model)
    add_hook_to_module(model.mid_block.resnets[0], _TripleHook())
    expected = call(model)
    assert relative_error(expected, base) > 1e-3
    with pytest.raises(fastsd.PatchError, match=r"mid_block\.resnets\.0: ResnetBlock2D has an instance forward"):
        fastsd.patch(model, strict=True)
    with pytest.warns(UserWarning, match="instance forward"):
        fastsd.patch(model)
    assert type(model.mid_block.resnets[0]) is ResnetBlock2D
    assert_as_stock(call(model), expected)


def test_row_5_hook_that_outlives_the_patch():
    """accelerate keeps the bound forward that it found: the fast one, of a block that is stock again later."""
    model = build()
    base = call(model)
    fastsd.patch(model)
    block = model.mid_block.resnets[0]
    add_hook_to_module(block, ModelHook())
    assert_as_stock(call(model), base)
    assert op_calls(lambda: call(model)) == 16
    fastsd.unpatch(model)
    assert torch.equal(call(model), base)
    remove_hook_from_module(block)
    assert "forward" in vars(block)
    assert torch.equal(call(model), base)
    fastsd.patch(model, strict=True)
    assert op_calls(lambda: call(model)) == 16


def _group_offload(offload_type, folder, model):
    blocks_per_group = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        offload_to_disk_path=str(folder / f"{id(model)}"),
        **blocks_per_group,
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("ignore:fastsd.patch left")
def test_row_5_sequential_offload(when):
    """Parameters are on the meta device but for the call of their own module."""
    model = build()
    expected = call(model)
    inputs = example_inputs(model, 2, 16, tokens=7)
    if when == "after":
        fastsd.patch(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    fastsd.patch(model)
    assert blocks(model)[0].norm1.weight.device.type == "meta"
    assert_as_stock(call(model, **inputs), expected)
    fastsd.unpatch(model)
    assert torch.equal(call(model, **inputs), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_row_5_model_offload(when):
    model = build()
    expected = call(model)
    if when == "after":
        fastsd.patch(model)
    _, hook = accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    fastsd.patch(model, strict=True)
    assert_as_stock(call(model), expected)
    assert op_calls(lambda: call(model)) == 16
    hook.remove()
    assert torch.equal(call(fastsd.unpatch(model)), expected)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
@pytest.mark.filterwarnings("ignore:fastsd.patch left")
def test_row_5_group_offload(offload_type, when, tmp_path):
    model = build()
    expected = call(model)
    if when == "after":
        fastsd.patch(model)
    _group_offload(offload_type, tmp_path, model)
    fastsd.patch(model)
    for _ in range(2):
        assert_as_stock(call(model), expected)
    fastsd.unpatch(model)
    assert torch.equal(call(model), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_row_5_layerwise_casting(when):
    """Float8 storage: convolutions are cast for each call, norms keep their dtype."""
    stock, model = build(), build()
    base = call(stock)
    if when == "after":
        fastsd.patch(model)
    for each in (stock, model):
        each.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    fastsd.patch(model, strict=True)
    assert blocks(model)[0].conv1.weight.dtype == torch.float8_e4m3fn
    assert relative_error(call(stock), base) > 1e-3
    assert_as_stock(call(model), call(stock))
    assert op_calls(lambda: call(model)) == 16
    assert torch.equal(call(fastsd.unpatch(model)), call(stock))
