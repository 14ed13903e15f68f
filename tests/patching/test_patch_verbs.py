"""patch, unpatch and patched: what they return, refuse, change and leave alone. Row 14 of the compatibility matrix."""

import subprocess
import sys
import threading
import warnings

import diffusers
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import fastsd
from fastsd.models import load
from fastsd.nn.replacement import Replacement
from fastsd.nn.resnet_block import ResnetBlock2D as FastResnetBlock2D
from fastsd_kernels import dispatch
from tests.patching.models import assert_as_stock, blocks, build, call


def fingerprint(model):
    """Everything that patch could have left on a model: classes, attributes, tensors."""
    return [
        (path, type(module), {key: id(value) for key, value in vars(module).items()})
        for path, module in model.named_modules()
    ], [(name, id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()]


def assert_untouched(model, before):
    modules, tensors = fingerprint(model)
    assert modules == before[0]
    assert all(
        (name, identity) == (old_name, old_identity) and torch.equal(value, old)
        for (name, identity, value), (old_name, old_identity, old) in zip(tensors, before[1], strict=True)
    )


def fast(model):
    return [type(block) is FastResnetBlock2D for block in blocks(model)]


def backends(model):
    return {entry.backends["group_norm_silu"] for entry in fastsd.report(model).entries if entry.replaced}


def pipeline(unet=None, vae=None, **parts):
    return diffusers.StableDiffusionPipeline(
        vae=vae or build("vae"),
        unet=unet or build(),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )


class ControlledPipeline:
    """A pipeline as patch sees it: something with ``components``."""

    def __init__(self, **components):
        self.components = components


@pytest.mark.parametrize("name", ["unet", "unet_2d_model", "controlnet", "vae"])
def test_patch_leaves_no_trace(name):
    model = build(name)
    before = fingerprint(model)
    assert fastsd.patch(model) is model
    assert all(fast(model))
    assert fastsd.unpatch(model) is model
    assert_untouched(model, before)


def test_patch_touches_only_replaced_blocks():
    model = build()
    before = {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    stock_forward = ResnetBlock2D.forward
    fastsd.patch(model)
    for path, module in model.named_modules():
        if not isinstance(module, ResnetBlock2D):
            assert (type(module), set(vars(module))) == before[path]
    assert ResnetBlock2D.forward is stock_forward
    assert not any(fast(build()))


def test_stock_names():
    model = fastsd.patch(build())
    stock = build()
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in stock.named_modules()]
    assert str(model) == str(stock)
    assert {type(block).__name__ for block in blocks(model)} <= set(model._no_split_modules)
    assert type(model) is diffusers.UNet2DConditionModel


def test_row_14_patch_twice():
    model = fastsd.patch(build())
    before = fingerprint(model)
    fastsd.patch(model)
    assert_untouched(model, before)


def test_row_14_unpatch_twice():
    model = build()
    before = fingerprint(model)
    fastsd.unpatch(fastsd.unpatch(fastsd.patch(model)))
    assert_untouched(model, before)


@torch.no_grad()
def test_row_14_two_models():
    one, other = build(seed=1), build(seed=2)
    stock = call(one), call(other)
    fastsd.patch(one)
    assert torch.equal(call(other), stock[1])
    fastsd.patch(other)
    assert_as_stock(call(one), stock[0])
    assert_as_stock(call(other), stock[1])
    fastsd.unpatch(one)
    assert torch.equal(call(one), stock[0])
    assert all(fast(other))


def test_row_14_threads():
    """Each thread patches, runs and unpatches its own model."""
    with torch.no_grad():
        models = [build(seed=seed) for seed in range(2)]
        stock = [call(model) for model in models]
    failures = []

    def work(model, expected):
        try:
            with torch.no_grad():
                for _ in range(10):
                    assert_as_stock(call(fastsd.patch(model)), expected)
                    assert torch.equal(call(fastsd.unpatch(model)), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, stock, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


_FORK = """
import os, sys, torch, fastsd
from tests.patching.models import assert_as_stock, build, call
torch.set_num_threads(1)
with torch.no_grad():
    model = build()
    stock = call(model)
    fastsd.patch(model)
    child = os.fork()
    assert_as_stock(call(model), stock)
    fastsd.unpatch(model)
    assert torch.equal(call(model), stock)
    if child == 0:
        os._exit(0)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_row_14_fork():
    subprocess.run([sys.executable, "-c", _FORK], check=True, timeout=120)


@torch.no_grad()
def test_patched_restores():
    model = build()
    before = fingerprint(model)
    with fastsd.patched(model) as inside:
        assert inside is model
        assert all(fast(model))
    assert_untouched(model, before)
    with pytest.raises(KeyError), fastsd.patched(model):
        raise KeyError
    assert_untouched(model, before)


def test_patched_keeps_an_earlier_patch():
    model = fastsd.patch(build(), backend="reference")
    before = fingerprint(model)
    with fastsd.patched(model, backend="cpu"):
        assert backends(model) == {"cpu"}
    assert_untouched(model, before)
    pipe = pipeline(unet=model)
    with fastsd.patched(pipe, backend="reference"):
        assert all(fast(pipe.vae))
    assert not any(fast(pipe.vae))
    assert_untouched(model, before)


def test_patched_keeps_what_was_done_inside():
    model = build()
    with fastsd.patched(model):
        fastsd.unpatch(model)
    assert not any(fast(model))
    with fastsd.patched(model):
        fastsd.patch(model, backend="reference")
    assert all(fast(model))


def test_another_backend_updates():
    model = fastsd.patch(fastsd.patch(build()), backend="reference")
    assert backends(model) == {"reference"}
    assert backends(fastsd.patch(model)) == {"cpu"}


@torch.no_grad()
def test_backend_is_used(monkeypatch):
    model = fastsd.patch(build(), backend="reference")
    monkeypatch.setattr(dispatch.Op, "choose", lambda op, *args, backend: pytest.fail(f"backend {backend}"))
    with pytest.raises(pytest.fail.Exception, match="backend reference"):
        call(model)


class TestParts:
    def test_pipeline(self):
        pipe = pipeline()
        before = fingerprint(pipe.unet), fingerprint(pipe.vae)
        assert fastsd.patch(pipe) is pipe
        assert all(fast(pipe.unet))
        assert all(fast(pipe.vae))
        assert fastsd.unpatch(pipe) is pipe
        assert_untouched(pipe.unet, before[0])
        assert_untouched(pipe.vae, before[1])

    def test_part_of_a_patched_pipeline(self):
        pipe = fastsd.patch(pipeline())
        fastsd.unpatch(pipe.unet)
        assert not any(fast(pipe.unet))
        assert all(fast(pipe.vae))

    @pytest.mark.parametrize("several", [list, tuple, diffusers.MultiControlNetModel], ids=lambda t: t.__name__)
    def test_several_controlnets(self, several):
        nets = [build("controlnet", seed=seed) for seed in range(2)]
        pipe = ControlledPipeline(unet=build(), controlnet=several(nets), tokenizer="tokenizer", text_encoder=None)
        fastsd.patch(pipe)
        assert all(fast(nets[0]) + fast(nets[1]) + fast(pipe.components["unet"]))
        fastsd.unpatch(pipe)
        assert not any(fast(nets[0]) + fast(nets[1]) + fast(pipe.components["unet"]))

    def test_wrapped_model(self):
        model = build()
        fastsd.patch(nn.Sequential(model))
        assert all(fast(model))

    def test_block_shared_by_two_parents(self):
        model = build()
        model.up_blocks[0].resnets[1] = model.up_blocks[0].resnets[0]
        with fastsd.patched(model):
            assert fast(model) == [True] * 7
            assert sum(entry.replaced for entry in fastsd.report(model).entries) == 7
        assert fast(model) == [False] * 7

    def test_block_shared_by_two_parts(self):
        unet, vae = build(), build("vae")
        vae.decoder.mid_block.resnets[0] = unet.mid_block.resnets[0]
        with fastsd.patched(ControlledPipeline(unet=unet, vae=vae)):
            assert all(fast(unet) + fast(vae))
        assert not any(fast(unet) + fast(vae))

    def test_part_without_a_module_that_a_rule_knows(self):
        encoder = nn.Sequential(nn.Linear(4, 4))
        pipe = ControlledPipeline(unet=build(), text_encoder=encoder)
        fastsd.patch(pipe, strict=True)
        assert type(encoder[0]) is nn.Linear


class TestRefusals:
    """Every error leaves the model as it was."""

    @pytest.mark.parametrize("verb", [fastsd.patch, fastsd.unpatch, fastsd.report])
    @pytest.mark.parametrize(
        "model", [None, "sd15", {"unet": 1}, torch.zeros(3), diffusers.UNet2DConditionModel], ids=repr
    )
    def test_not_a_model(self, verb, model):
        with pytest.raises(TypeError, match=f"expected a diffusers model or pipeline.*{type(model).__name__}"):
            verb(model)

    @pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(2, 2, 1)), ControlledPipeline()])
    def test_nothing_that_a_rule_knows(self, model):
        with pytest.raises(ValueError, match=f"ResnetBlock2D.*{type(model).__name__} holds none"):
            fastsd.patch(model)

    def test_root_is_never_replaced(self):
        block = build().mid_block.resnets[0]
        with pytest.raises(ValueError, match="holds none"):
            fastsd.patch(block)
        assert type(block) is ResnetBlock2D

    def test_subclass_is_not_matched(self):
        class Mine(ResnetBlock2D):
            pass

        model = build()
        model.mid_block.resnets[0].__class__ = Mine
        fastsd.patch(model, strict=True)
        assert fast(model).count(False) == 1

    @pytest.mark.parametrize("strict", [True, False])
    def test_hooked_module(self, strict):
        model = build()
        hooked = model.mid_block.resnets[0]
        hooked.norm1.register_forward_hook(lambda module, args, output: None)
        before = fingerprint(model)
        if strict:
            with pytest.raises(fastsd.PatchError, match=r"1 of 8.*mid_block\.resnets\.0: norm1 has a forward hook"):
                fastsd.patch(model, strict=True)
            assert_untouched(model, before)
        else:
            with pytest.warns(UserWarning, match=r"left 1 modules.*mid_block\.resnets\.0.*norm1 has a forward hook"):
                fastsd.patch(model)
            assert type(hooked) is ResnetBlock2D
            assert fast(model).count(True) == 7

    def test_strict_names_every_module(self):
        model = build()
        for block in blocks(model):
            block.nonlinearity = nn.GELU()
        with pytest.raises(fastsd.PatchError) as caught:
            fastsd.patch(model, strict=True)
        message = str(caught.value)
        assert message.count("nonlinearity is a torch.nn.modules.activation.GELU, expected a plain SiLU") == 8
        for path in ("down_blocks.0.resnets.0", "mid_block.resnets.1", "up_blocks.1.resnets.1"):
            assert path in message

    def test_no_warning_without_a_refusal(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fastsd.patch(build())

    def test_unknown_backend(self):
        model = build()
        before = fingerprint(model)
        with pytest.raises(ValueError, match="backend: expected one of cuda, triton, cpu, reference; got 'numpy'"):
            fastsd.patch(model, backend="numpy")
        assert_untouched(model, before)

    @pytest.mark.parametrize("again", [False, True])
    @pytest.mark.parametrize("backend", ["cuda", "triton"])
    def test_gpu_backend_on_a_cpu_model(self, backend, again):
        """Also where the model is patched already: it keeps the settings that it has."""
        model = fastsd.patch(build()) if again else build()
        before = fingerprint(model)
        with pytest.raises(dispatch.BackendUnavailable, match=f"group_norm_silu: backend '{backend}' cannot be used"):
            fastsd.patch(model, backend=backend)
        assert_untouched(model, before)
        with pytest.raises(dispatch.BackendUnavailable), fastsd.patched(model, backend=backend):
            pytest.fail("the block must not run")
        assert_untouched(model, before)

    def test_one_part_of_a_pipeline(self):
        """The backend serves the U-Net's dtype and not the VAE's: neither is patched."""
        pipe = ControlledPipeline(unet=build(), vae=build("vae").double())
        before = fingerprint(pipe.components["unet"])
        with pytest.raises(dispatch.BackendUnavailable, match="float64"):
            fastsd.patch(pipe, backend="cpu")
        assert_untouched(pipe.components["unet"], before)

    def test_error_half_way(self):
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

    def test_class_changed_by_something_else(self):
        """As sharding does: its class derives from the fast one."""
        model = fastsd.patch(build())
        block = blocks(model)[2]
        block.__class__ = type("ShardedResnetBlock2D", (FastResnetBlock2D,), {})
        before = fingerprint(model)
        with pytest.raises(fastsd.PatchError, match="ShardedResnetBlock2D"):
            fastsd.unpatch(model)
        assert_untouched(model, before)

    def test_overwritten_class_forward(self, monkeypatch):
        def forward(self, input_tensor, temb):
            return input_tensor

        monkeypatch.setattr(ResnetBlock2D, "forward", forward)
        with pytest.raises(fastsd.PatchError, match=r"ResnetBlock2D\.forward has been overwritten by test_patch_verbs"):
            fastsd.patch(build(), strict=True)

    @pytest.mark.parametrize(
        ("attribute", "value", "says"),
        [
            ("norm1", nn.BatchNorm2d(4), "norm1 is a torch.nn.modules.batchnorm.BatchNorm2d"),
            ("nonlinearity", nn.Identity(), "nonlinearity is a torch.nn.modules.linear.Identity"),
        ],
    )
    def test_other_leaves(self, attribute, value, says):
        model = build()
        setattr(model.mid_block.resnets[0], attribute, value)
        with pytest.raises(fastsd.PatchError, match=says):
            fastsd.patch(model, strict=True)


def test_row_13_named_models():
    """Every residual block of the models that users have, by structure alone."""
    expected = {
        "sd15": 22,
        "sd21": 22,
        "sdxl": 17,
        "ssd1b": 16,
        "vega": 16,
        "bk-base": 14,
        "bk-small": 12,
        "bk-tiny": 9,
        "inpaint": 22,
        "ip2p": 22,
        "lcm": 22,
        "controlnet-sd15": 10,
    }
    for name, count in expected.items():
        model = fastsd.patch(load(name, device="meta", weights=False), strict=True)
        assert (name, len(blocks(model)), all(fast(model))) == (name, count, True)
