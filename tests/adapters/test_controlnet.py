"""ControlNets of the full model: each residual reaches the map of a pruned U-Net that it is meant for."""

import copy
import pickle

import diffusers
import pytest
import torch

import fastsd
from fastsd.adapters import controlnet_from_unet, fit_controlnet, origin_of
from fastsd.models import example_inputs
from tests.adapters.models import KINDS, WHEN, patched_around, pruned, relative_error
from tests.combinations import each_value, long
from tests.compress.models import SMALL_XL, build, call, shared

MIDDLE = 1000.0
EMBEDDING = {"conditioning_embedding_out_channels": (4, 4)}


def controlnet_of(full):
    """One whose residuals differ, and depend on its inputs."""
    net = diffusers.ControlNetModel.from_unet(full, **EMBEDDING).eval().requires_grad_(False)
    torch.manual_seed(3)
    for parameter in net.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)
    return net


def constant(net):
    """Its residual ``i`` is ``i + 1`` everywhere, and 1000 behind the mid block."""
    for index, conv in enumerate(net.controlnet_down_blocks):
        conv.weight.zero_()
        conv.bias.fill_(index + 1)
    net.controlnet_mid_block.weight.zero_()
    net.controlnet_mid_block.bias.fill_(MIDDLE)
    return net


def residuals_of(net, unet, **keywords):
    inputs = example_inputs(unet, 2, 16, tokens=7)
    return net(**inputs, controlnet_cond=torch.rand(2, 3, 32, 32), **keywords)


def with_control(net, unet, **keywords):
    torch.manual_seed(9)
    down, middle = residuals_of(net, unet, **keywords)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def watched(unet, **keywords):
    """What the up-blocks got (maps of the down-blocks; the map to work on), and what each module in front of them made.

    Where a transformer stands behind a residual block, the map is the transformer's, and goes by the block's name.
    """
    got, middle, made = [], [], {}
    handles = []

    def take(block, args, kwargs):
        got.extend(reversed(kwargs["res_hidden_states_tuple"]))
        middle.append(kwargs["hidden_states"])

    for block in unet.up_blocks:
        handles.append(block.register_forward_pre_hook(take, with_kwargs=True))
    for path, module in unet.named_modules():
        parts = path.split(".")
        if path == "conv_in" or (parts[0] == "down_blocks" and len(parts) == 4):

            def note(module, args, output, path=path):
                output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
                made[path.replace("attentions", "resnets")] = output

            handles.append(module.register_forward_hook(note))
    call(unet, **keywords)
    for handle in handles:
        handle.remove()
    return got, middle[0], made


def additions(unet, control):
    """What was added to the map of which module of the full model, and what to the one that the up-blocks work on."""
    known = origin_of(unet)
    plain, plain_middle, made = watched(unet)
    with_it, middle, _ = watched(unet, **control)
    found = {}
    for before, after in zip(plain, with_it, strict=True):
        (maker,) = [path for path, value in made.items() if torch.equal(value, before)]
        found[known.source_of(maker)] = (after - before).mean().round().item()
        assert (after - before).std() < 1e-3
    return found, (middle - plain_middle).mean().round().item()


@pytest.mark.parametrize("name", KINDS)
def test_each_residual_reaches_its_map(name):
    full = shared(name)
    net = constant(controlnet_of(full))
    expected, middle = additions(full, with_control(net, full))
    assert sorted(expected.values()) == [index + 1.0 for index in range(len(net.controlnet_down_blocks))]
    assert middle == MIDDLE
    small = pruned(name)
    fitted, report = fit_controlnet(net, small)
    found, middle = additions(small, with_control(fitted, small))
    assert found == {path: expected[path] for path in found}
    assert middle == (0 if name in ("bk-sdm-tiny", "level") else MIDDLE)
    assert {*report.used} == {*found, *(["mid_block"] if middle else [])}
    assert {*report.used, *report.skipped} == {*expected, "mid_block"}


@each_value("name,when", ["bk-sdm-tiny", "a-sdm"], WHEN)
def test_with_patch(name, when):
    net = controlnet_of(shared(name))
    small = pruned(name)
    control = with_control(fit_controlnet(net, small)[0], small)
    expected = call(small, **control)
    assert relative_error(call(small), expected) > 1e-2
    fitted = []
    patched_around(small, when, lambda small: fitted.append(fit_controlnet(net, small)[0]))
    fastsd.patch(fitted[0])
    assert relative_error(call(small, **with_control(fitted[0], small)), expected) < 1e-4


def test_the_given_one_stays_as_it_is():
    full = shared()
    net = controlnet_of(full)
    names = set(vars(net))
    before = with_control(net, full)
    small = fastsd.compress(full, "bk-sdm-tiny")
    fitted, report = fit_controlnet(net, small)
    after = with_control(net, full)
    assert len(after["down_block_additional_residuals"]) == 12
    for a, b in zip(before["down_block_additional_residuals"], after["down_block_additional_residuals"], strict=True):
        assert torch.equal(a, b)
    assert set(vars(net)) == names
    assert not net._forward_hooks
    assert type(fitted) is diffusers.ControlNetModel
    assert fitted.config == net.config
    assert all(a is b for a, b in zip(fitted.parameters(), net.parameters(), strict=True))
    # so what is loaded into one is in both, and a child or hook of one is its own
    fitted.register_forward_hook(lambda *_: None)
    fitted.add_module("more", torch.nn.Identity())
    assert not net._forward_hooks
    assert not hasattr(net, "more")
    assert str(report).startswith("ControlNet: 6 of 13 places are used")


def test_fitted_again_and_copied(tmp_path):
    full = shared()
    net = controlnet_of(full)
    tiny, base = pruned("bk-sdm-tiny"), pruned("bk-sdm-base")
    expected = with_control(fit_controlnet(net, base)[0], base)
    fitted, _ = fit_controlnet(fit_controlnet(net, tiny)[0], base)
    for each in (fitted, copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        given = with_control(each, base)
        for key, value in expected.items():
            assert all(map(torch.equal, given[key], value))
    back, report = fit_controlnet(fitted, full)
    assert not report.skipped
    assert len(with_control(back, full)["down_block_additional_residuals"]) == 12
    # as what it was made of
    fitted.save_pretrained(tmp_path)
    loaded = diffusers.ControlNetModel.from_pretrained(tmp_path)
    assert len(with_control(loaded, full)["down_block_additional_residuals"]) == 12


@pytest.mark.parametrize("name", ["bk-sdm-tiny", *long("bk-sdm-small")])
def test_forms_of_output(name):
    """Those of diffusers: two nets, guess mode, an output object, residuals that are means over the map."""
    net = controlnet_of(shared())
    small = pruned(name)
    fitted, _ = fit_controlnet(net, small)
    one = with_control(fitted, small)
    several, _ = fit_controlnet(diffusers.MultiControlNetModel([net, net]), small)
    assert type(several) is diffusers.MultiControlNetModel
    image = torch.rand(2, 3, 32, 32)
    inputs = example_inputs(small, 2, 16, tokens=7)
    single = fitted(**inputs | {"return_dict": True}, controlnet_cond=image)
    assert type(single).__name__ == "ControlNetOutput"
    down, middle = several(**inputs, controlnet_cond=[image, image], conditioning_scale=[1.0, 1.0])
    for a, b in zip((*down, middle), (*single.down_block_res_samples, single.mid_block_res_sample), strict=True):
        torch.testing.assert_close(a, 2 * b)
    # the scales of guess mode are those of the full model's residuals
    torch.manual_seed(9)
    every, _ = residuals_of(net, small, guess_mode=True)
    guessed = with_control(fitted, small, guess_mode=True)["down_block_additional_residuals"]
    assert all(any(torch.equal(a, b) for b in every) for a in guessed)
    assert len(guessed) == len(one["down_block_additional_residuals"])
    pooled = diffusers.ControlNetModel.from_config({**net.config, "global_pool_conditions": True})
    fitted, _ = fit_controlnet(pooled, small)
    assert call(small, **with_control(fitted, small)).isfinite().all()


def test_refusals():
    full, small = shared(), pruned("bk-sdm-base")
    with pytest.raises(TypeError, match="controlnet: expected a diffusers ControlNetModel; got UNet2DConditionModel"):
        fit_controlnet(full, small)
    with pytest.raises(ValueError, match=r"of \[8, 8, 8, 8, 16, .*\] channels; got \[8, 8, 8, 16, .*needs no fit"):
        fit_controlnet(diffusers.ControlNetModel.from_unet(small, **EMBEDDING), small)
    net = diffusers.ControlNetModel.from_unet(full, **EMBEDDING)
    compiled = "controlnet: expected one that is not compiled; fit it first, then compile"
    several = diffusers.MultiControlNetModel([net, torch.compile(net)])
    for each in (torch.compile(net), several, torch.compile(several)):
        with pytest.raises(ValueError, match=compiled):
            fit_controlnet(each, small)
    in_place = copy.deepcopy(net)
    in_place.compile()
    with pytest.raises(ValueError, match=compiled):
        fit_controlnet(in_place, small)
    net.forward = net.forward
    with pytest.raises(ValueError, match="expected no forward of its own"):
        fit_controlnet(net, small)
    with pytest.raises(TypeError, match="controlnet: expected a diffusers ControlNetModel; got NoneType"):
        fit_controlnet(None, small)


@pytest.mark.parametrize("name", ["bk-sdm-small", "ssd-1b", *long("bk-sdm-base", "bk-sdm-tiny")])
def test_a_controlnet_of_a_pruned_unet(name):
    small = pruned(name)
    if name in ("bk-sdm-small", "bk-sdm-tiny"):
        with pytest.raises(ValueError, match="unknown mid_block_type : None"):
            diffusers.ControlNetModel.from_unet(small)
    if name == "ssd-1b":
        small = build(SMALL_XL, transformer_layers_per_block=(1, 2, 4), mid_block_type="UNetMidBlock2D")
    net = controlnet_from_unet(small, **EMBEDDING).eval()
    assert type(net) is diffusers.ControlNetModel
    given = small.state_dict()
    copied = [key for key, value in net.state_dict().items() if key in given and torch.equal(value, given[key])]
    assert len(copied) == sum(not key.startswith(("up_blocks", "conv_norm", "conv_out")) for key in given)
    # the block that takes the place of the mid block changes nothing yet, and trains
    if small.mid_block is None:
        x = torch.randn(1, small.config.block_out_channels[-1], 4, 4)
        assert torch.equal(net.mid_block(x, torch.randn(1, 32)), x)
    assert call(small, **with_control(net, small)).equal(call(small))
    for parameter in net.parameters():
        parameter.add_(0.1)
    assert relative_error(call(small, **with_control(net, small)), call(small)) > 1e-3
    types = {"bk-sdm-base": "UNetMidBlock2DCrossAttn", "ssd-1b": "UNetMidBlock2D"}
    assert small.config.mid_block_type == types.get(name)


def test_no_controlnet_of_others():
    with pytest.raises(ValueError, match=r"expected a stock UNet2DConditionModel .*CompressedUNet.*fit_controlnet"):
        controlnet_from_unet(pruned("a-sdm"))
