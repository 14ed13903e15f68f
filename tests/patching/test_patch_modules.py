"""What holds for every kind of module that is replaced: what is put on it runs, and what is not served is stock's."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation
from transformers.models.clip import modeling_clip

import fastsd
from fastsd_kernels.linear import cpu_speed
from tests.combinations import pairwise
from tests.patching import test_patch_attention as attention
from tests.patching import test_patch_containers as containers
from tests.patching import test_patch_feed_forward as feed_forward
from tests.patching import test_patch_text_encoder as text_encoder
from tests.patching import test_patch_transformer_block as transformer_block
from tests.patching.models import assert_as_stock, build, call, calls_of, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:fastsd.patch left")


class Kind(NamedTuple):
    """A module, how it is called, paths inside of it, and methods of classes that it runs."""

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    paths: tuple[str, ...]
    methods: tuple[tuple[type, str], ...] = ()


def dtype_of(model):
    return next(model.parameters()).dtype


VAE_PATHS = [f"{half}.{leaf}" for half in ("encoder", "decoder") for leaf in ("conv_norm_out", "conv_act", "conv_out")]
UP_PATHS = tuple(f"up_blocks.0.resnets.0.{leaf}" for leaf in ("norm1", "conv1", "conv2", "conv_shortcut", "dropout"))
BLOCK_PATHS = ("norm1", "attn1", "attn1.to_q", "attn1.to_out.0", "norm2", "attn2", "norm3", "ff")
CLIP_PATHS = ("layer_norm1", "self_attn", "self_attn.q_proj", "self_attn.out_proj", "layer_norm2", "mlp", "mlp.fc1",
              "mlp.activation_fn", "mlp.fc2")  # fmt: skip
CONTINUOUS = ("_operate_on_continuous_inputs", "_get_output_for_continuous_inputs")
FORWARD_OF_CLIP = (modeling_clip.CLIPEncoderLayer, modeling_clip.CLIPAttention, modeling_clip.CLIPMLP,
                   QuickGELUActivation, nn.LayerNorm)  # fmt: skip
KINDS = {
    "attention": Kind(
        attention.layer,
        lambda model: model[0](attention.X.to(dtype_of(model))),
        ("0", "0.to_q", "0.to_v", "0.to_out.0"),
        ((AttnProcessor2_0, "__call__"),),
    ),
    "packed": Kind(lambda: attention.layer(is_packed=True), lambda model: model[0](attention.X), ("0.to_qkv",)),
    "feed_forward": Kind(
        feed_forward.layer,
        lambda model: model[0](feed_forward.tokens(dtype=dtype_of(model))),
        ("0.net.0", "0.net.0.proj", "0.net.1", "0.net.2"),
        ((nn.Linear, "forward"), (GEGLU, "forward"), (FeedForward, "forward")),
    ),
    "transformer_block": Kind(
        transformer_block.layer,
        lambda model: model[0](transformer_block.X, encoder_hidden_states=transformer_block.TEXT),
        tuple(f"0.{path}" for path in BLOCK_PATHS),
        ((nn.LayerNorm, "forward"), (BasicTransformerBlock, "forward")),
    ),
    "transformer": Kind(
        containers.transformer,
        containers.run,
        ("0.norm", "0.proj_in", "0.proj_out"),
        tuple((Transformer2DModel, method) for method in CONTINUOUS),
    ),
    "linear_transformer": Kind(
        lambda: containers.transformer(use_linear_projection=True),
        containers.run,
        ("0.norm", "0.proj_in", "0.proj_out"),
    ),
    "up_block": Kind(lambda: build("small"), call, UP_PATHS, ((UpBlock2D, "forward"),)),
    "cross_attention_up_block": Kind(lambda: build("cross_up"), call, UP_PATHS, ((CrossAttnUpBlock2D, "forward"),)),
    "vae": Kind(
        lambda: build("vae"),
        call,
        ("encoder.conv_in", "decoder.conv_in", *VAE_PATHS),
        ((Decoder, "forward"),),
    ),
    "clip": Kind(
        text_encoder.encoder,
        text_encoder.call,
        tuple(f"encoder.layers.1{'.' * bool(path)}{path}" for path in ("", *CLIP_PATHS)),
        tuple((cls, "forward") for cls in FORWARD_OF_CLIP),
    ),
}
PATHS = [(name, path) for name, kind in KINDS.items() for path in kind.paths]
METHODS = [(name, *method) for name, kind in KINDS.items() for method in kind.methods]
WHEN = ["before", "after"]


def names_of(value):
    return "-".join(getattr(each, "__name__", str(each)) for each in (value if isinstance(value, tuple) else (value,)))


def other(output):
    """What no norm behind it undoes, as it would a factor."""
    return (2 * output[0].abs(), *output[1:]) if isinstance(output, tuple) else 2 * output.abs()


@pairwise("place,when,is_faster", PATHS, WHEN, [False, True], ids=names_of)
def test_a_hook_runs(place, when, is_faster, monkeypatch):
    monkeypatch.setattr(cpu_speed, "_is_faster", is_faster)
    kind, path = KINDS[place[0]], place[1]

    def hooked(model):
        model.get_submodule(path).register_forward_hook(lambda module, args, output: other(output))
        return model

    stock = kind.run(hooked(kind.make()))
    assert relative_error(kind.run(kind.make()), stock) > 1e-3
    model = fastsd.patch(hooked(kind.make())) if when == "before" else hooked(fastsd.patch(kind.make()))
    assert_as_stock(kind.run(model), stock)


@pairwise("method,when,is_faster", METHODS, WHEN, [False, True], ids=names_of)
def test_class_level_patches_run(method, when, is_faster, monkeypatch):
    monkeypatch.setattr(cpu_speed, "_is_faster", is_faster)
    (name, cls, method), seen = method, []
    kind, right = KINDS[name], getattr(cls, method)
    model = fastsd.patch(kind.make()) if when == "after" else kind.make()
    monkeypatch.setattr(cls, method, lambda *args, **kwargs: seen.append(1) or other(right(*args, **kwargs)))
    stock, of_stock = kind.run(kind.make()), len(seen)
    if when == "before":
        fastsd.patch(model)
    assert_as_stock(kind.run(model), stock)
    assert len(seen) == 2 * of_stock > 0


@pytest.mark.gradients
@pytest.mark.parametrize("name", ["attention", "packed", "feed_forward", "transformer", "linear_transformer"])
def test_gradients_are_stocks(name, monkeypatch):
    """No op that is of inference alone runs where gradients are wanted."""
    monkeypatch.setattr(cpu_speed, "_is_faster", True)
    gradients = []
    for prepare in (lambda model: model, fastsd.patch):
        model = prepare(KINDS[name].make()).requires_grad_().train()
        for op in ("linear", "attention"):
            model.zero_grad()
            assert calls_of(op, lambda model=model: KINDS[name].run(model).square().sum().backward()) == 0
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, "autocast"], ids=str)
@pytest.mark.parametrize("name", ["attention", "feed_forward", "clip"])
def test_other_dtypes_are_stocks(name, dtype, monkeypatch):
    monkeypatch.setattr(cpu_speed, "_is_faster", True)
    results = []
    for prepare in (lambda model: model, fastsd.patch):
        model = KINDS[name].make() if dtype == "autocast" else KINDS[name].make().to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            results.append(KINDS[name].run(prepare(model)))
    assert torch.equal(*results)
