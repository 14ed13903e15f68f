"""What patch refuses: one clear sentence, and the model is as it was."""

import warnings

import diffusers
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import fastsd
from fastsd.nn.replacement import Replacement
from fastsd.nn.resnet_block import ResnetBlock2D as FastResnetBlock2D
from fastsd_kernels import dispatch
from tests.patching.models import Pipeline, assert_untouched, blocks, build, fast, fingerprint


@pytest.mark.parametrize("verb", [fastsd.patch, fastsd.unpatch, fastsd.report])
@pytest.mark.parametrize("model", [None, "sd15", {"unet": 1}, torch.zeros(3), diffusers.UNet2DConditionModel], ids=repr)
def test_not_a_model(verb, model):
    with pytest.raises(TypeError, match=f"expected a diffusers model or pipeline.*{type(model).__name__}"):
        verb(model)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(2, 2, 1)), Pipeline()])
def test_nothing_that_a_rule_knows(model):
    with pytest.raises(ValueError, match=f"ResnetBlock2D.*{type(model).__name__} holds none"):
        fastsd.patch(model)


def test_root_is_never_replaced():
    block = build().mid_block.resnets[0]
    with pytest.raises(ValueError, match="holds none"):
        fastsd.patch(block)
    assert type(block) is ResnetBlock2D


def test_subclass_is_not_matched():
    class Mine(ResnetBlock2D):
        pass

    model = build()
    model.mid_block.resnets[0].__class__ = Mine
    fastsd.patch(model, strict=True)
    assert fast(model).count(False) == 1


@pytest.mark.parametrize("strict", [True, False])
def test_hooked_module(strict):
    model = build()
    hooked = model.mid_block.resnets[0]
    hooked.norm1.register_forward_hook(lambda module, args, output: None)
    before = fingerprint(model)
    if strict:
        with pytest.raises(fastsd.PatchError, match=r"1 of 32.*mid_block\.resnets\.0: norm1 has a forward hook"):
            fastsd.patch(model, strict=True)
        assert_untouched(model, before)
    else:
        with pytest.warns(UserWarning, match=r"left 1 modules.*mid_block\.resnets\.0.*norm1 has a forward hook"):
            fastsd.patch(model)
        assert type(hooked) is ResnetBlock2D
        assert fast(model).count(True) == 7


def test_strict_names_every_module():
    model = build()
    for block in blocks(model):
        block.nonlinearity = nn.GELU()
    with pytest.raises(fastsd.PatchError) as caught:
        fastsd.patch(model, strict=True)
    message = str(caught.value)
    assert message.count("nonlinearity is a torch.nn.modules.activation.GELU, expected a plain SiLU") == 8
    for path in ("down_blocks.0.resnets.0", "mid_block.resnets.1", "up_blocks.1.resnets.1"):
        assert path in message


def test_no_warning_without_a_refusal():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastsd.patch(build())


def test_unknown_backend():
    model = build()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="backend: expected one of cuda, triton, cpu, reference; got 'numpy'"):
        fastsd.patch(model, backend="numpy")
    assert_untouched(model, before)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_backend_on_a_cpu_model(backend, again):
    """Also where the model is patched already: it keeps the settings that it has."""
    model = fastsd.patch(build()) if again else build()
    before = fingerprint(model)
    with pytest.raises(dispatch.BackendUnavailable, match=f"conv2d: backend '{backend}' cannot be used"):
        fastsd.patch(model, backend=backend)
    assert_untouched(model, before)
    with pytest.raises(dispatch.BackendUnavailable), fastsd.patched(model, backend=backend):
        pytest.fail("the block must not run")
    assert_untouched(model, before)


def test_one_part_of_a_pipeline():
    """The backend serves the U-Net's dtype and not the VAE's: neither is patched."""
    pipe = Pipeline(unet=build(), vae=build("vae").double())
    before = fingerprint(pipe.components["unet"])
    with pytest.raises(dispatch.BackendUnavailable, match="float64"):
        fastsd.patch(pipe, backend="cpu")
    assert_untouched(pipe.components["unet"], before)


def test_error_half_way():
    """Python refuses the last change: those before it are taken back."""

    class Late(nn.Module):
        pass

    class Slotted(Replacement, Late):
        __slots__ = ("more",)

    Slotted.__name__ = "Late"
    model = nn.Sequential(build(), Late())
    before = fingerprint(model)
    with pytest.raises(TypeError, match="layout differs"):
        fastsd.patch(model, rules=["resnet_block", fastsd.Rule("late", Late, Slotted, lambda module: None)])
    assert_untouched(model, before)


def test_class_changed_by_something_else():
    """Its class derives from the fast one and overrides forward."""
    model = fastsd.patch(build())
    block = blocks(model)[2]
    block.__class__ = type("ShardedResnetBlock2D", (FastResnetBlock2D,), {"forward": ResnetBlock2D.forward})
    before = fingerprint(model)
    with pytest.raises(fastsd.PatchError, match="ShardedResnetBlock2D"):
        fastsd.unpatch(model)
    assert_untouched(model, before)


def test_overwritten_class_forward(monkeypatch):
    def forward(self, input_tensor, temb):
        return input_tensor

    monkeypatch.setattr(ResnetBlock2D, "forward", forward)
    with pytest.raises(fastsd.PatchError, match=r"ResnetBlock2D\.forward has been overwritten by test_patch_refusals"):
        fastsd.patch(build(), strict=True)


@pytest.mark.parametrize(
    ("attribute", "value", "says"),
    [
        ("norm1", nn.BatchNorm2d(4), "norm1 is a torch.nn.modules.batchnorm.BatchNorm2d"),
        ("nonlinearity", nn.Identity(), "nonlinearity is a torch.nn.modules.linear.Identity"),
    ],
)
def test_other_leaves(attribute, value, says):
    model = build()
    setattr(model.mid_block.resnets[0], attribute, value)
    with pytest.raises(fastsd.PatchError, match=says):
        fastsd.patch(model, strict=True)
