"""CLIP text encoders: norms, sums and the activation inside the products, and stock where more is asked for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip import modeling_clip

import fastsd
from fastsd.models import flat_output
from fastsd.nn import text_encoder
from fastsd.nn.replacement import settings_of
from fastsd_kernels.linear import cpu_speed
from tests.combinations import pairwise
from tests.patching.models import OpCalls, Pipeline, assert_as_stock, build, calls_of

pytestmark = pytest.mark.usefixtures("_own_product")

# what torch does without a fused layer
FUSED = ("aten::native_layer_norm", "aten::addmm", "aten::gelu", "aten::sigmoid")

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
TEXT = {"vocab_size": 50, "max_position_embeddings": 11, "eos_token_id": 49, "bos_token_id": 0, "pad_token_id": 1}
IDS = torch.randint(2, 49, (2, 11), generator=torch.Generator().manual_seed(1)).index_fill(1, torch.tensor([8]), 49)
MASK = (torch.arange(11) < torch.tensor([[9], [6]])).long()
# of a layer: q, k, v, out, fc1, fc2
PROJECTIONS = 6 * SIZES["num_hidden_layers"]


def randomised(model):
    """Norms that do not scale, and weights as small as stock's, would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def encoder(cls=CLIPTextModel, hidden_act="quick_gelu", attention="sdpa", **changes):
    torch.manual_seed(0)
    config = CLIPTextConfig(**SIZES | TEXT | {"hidden_act": hidden_act, "projection_dim": 16} | changes)
    config._attn_implementation = attention
    return randomised(cls(config))


def call(model, **given):
    """All values of an output: last states, pooled or projected, and what else was asked for."""
    return flat_output(model(input_ids=IDS, **given).to_tuple())


def layers(model):
    return [module for module in model.modules() if isinstance(module, modeling_clip.CLIPEncoderLayer)]


# changes of the configuration, and arguments of a call
OPTIONS = {
    "quick_gelu": ({}, {}),
    "gelu": ({"hidden_act": "gelu"}, {}),
    "gelu_python": ({"hidden_act": "gelu_python"}, {}),
    "gelu_new": ({"hidden_act": "gelu_new"}, {}),
    "eps": ({"layer_norm_eps": 0.1}, {}),
    "masked": ({}, {"attention_mask": MASK}),
    "masked_eager": ({"attention": "eager"}, {"attention_mask": MASK}),
    "hidden_states": ({}, {"output_hidden_states": True}),
    "attentions": ({"attention": "eager"}, {"output_attentions": True}),
}


@pairwise(
    "option,cls,is_faster",
    list(OPTIONS),
    [CLIPTextModel, CLIPTextModelWithProjection],
    [False, True],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_row_13_as_stock(option, cls, is_faster, monkeypatch):
    changes, given = OPTIONS[option]
    monkeypatch.setattr(cpu_speed, "_is_faster", is_faster)
    model = encoder(cls, **changes)
    stock = call(model, **given)
    fastsd.patch(model, strict=True)
    assert all(settings_of(layer).rule.name == "clip_layer" for layer in layers(model))
    assert_as_stock(call(model, **given), stock)
    assert calls_of("linear", lambda: call(model, **given)) == is_faster * PROJECTIONS
    assert torch.equal(call(fastsd.unpatch(model), **given), stock)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_norms_and_activations_are_in_the_products(hidden_act):
    model = fastsd.patch(encoder(hidden_act=hidden_act))
    with OpCalls(*FUSED) as others:
        call(model)
    assert others.names == ["aten::native_layer_norm"]  # the last one, which is in no layer


def test_states_are_those_of_every_layer():
    """As pipelines with ``clip_skip`` read them; what records them stays on the model and may not slow it down."""
    stock, model = encoder(), fastsd.patch(encoder())
    expected = stock(IDS, output_hidden_states=True).hidden_states
    states = model(IDS, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == SIZES["num_hidden_layers"] + 1
    for fast, of_stock in zip(states, expected, strict=True):
        torch.testing.assert_close(fast, of_stock, rtol=1e-4, atol=1e-5)
    assert calls_of("linear", lambda: call(model)) == PROJECTIONS


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("target", ["q_proj", "out_proj", "fc1", "fc2"])
def test_lora(target):
    def adapted(model):
        torch.manual_seed(3)
        return get_peft_model(model, LoraConfig(r=2, target_modules=[target], init_lora_weights=False)).eval()

    stock = call(adapted(encoder()))
    assert not torch.allclose(stock, call(encoder()), rtol=0.1)
    model = adapted(fastsd.patch(encoder()))
    assert_as_stock(call(model), stock)
    assert calls_of("linear", lambda: call(model)) == PROJECTIONS - SIZES["num_hidden_layers"]
    with model.disable_adapter():
        assert_as_stock(call(model), call(encoder()))


def test_norm_before_what_is_called_in_part():
    """Once, and not for each of the projections that would have it in their products."""
    model = get_peft_model(fastsd.patch(encoder()), LoraConfig(r=2, target_modules=["q_proj"])).eval()
    with OpCalls(*FUSED) as others:
        call(model)
    assert others.names.count("aten::native_layer_norm") == SIZES["num_hidden_layers"] + 1


def test_another_function_in_an_activation():
    model = encoder(hidden_act="gelu")
    for layer in layers(model):
        layer.mlp.activation_fn.act = lambda z: F.gelu(z, approximate="tanh") + 1
    stock = call(model)
    assert_as_stock(call(fastsd.patch(model)), stock)


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_mlp(when):
    """Of which nothing is known: it is called, and what else there is is patched and reported."""

    def put_in(model):
        layers(model)[1].mlp = nn.Sequential(nn.Linear(24, 24), nn.GELU()).requires_grad_(False)
        return randomised(model)

    stock = call(put_in(encoder()))
    model = fastsd.patch(put_in(encoder())) if when == "before" else put_in(fastsd.patch(encoder()))
    assert_as_stock(call(model), stock)
    assert "replaced by clip_layer" in str(fastsd.report(model))


@pytest.mark.parametrize(("target", "op_entries"), [("fc1", "layer"), ("q_proj", "attention")])
def test_report_of_what_runs_in_part(target, op_entries):
    model = get_peft_model(fastsd.patch(encoder()), LoraConfig(r=2, target_modules=[target])).eval()
    entries = [entry for entry in fastsd.report(model).entries if entry.rule == f"clip_{op_entries}"]
    assert [entry.backends for entry in entries] == [{"linear": "cpu"}] * SIZES["num_hidden_layers"]


def test_an_attention_function_of_a_users_own_is_called():
    seen = []

    def first_value(module, q, k, v, attention_mask, scaling, dropout=0.0, **told):
        seen.append((q.shape, q.stride(), attention_mask, scaling, dropout, told))
        return v.transpose(1, 2), None

    outputs = []
    modeling_clip.ALL_ATTENTION_FUNCTIONS.register("first_value", first_value)
    for prepare in (lambda model: model, fastsd.patch):
        model = prepare(encoder())
        model.config._attn_implementation = "first_value"
        outputs.append(call(model.train()))
    assert_as_stock(outputs[1], outputs[0])
    of_stock, of_fast = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(of_stock) == SIZES["num_hidden_layers"]
    assert of_fast == of_stock


def test_attention_dropout_draws_as_stock():
    outputs = []
    for prepare in (lambda model: model, fastsd.patch):
        model = prepare(encoder(attention_dropout=0.5)).train()
        torch.manual_seed(2)
        outputs.append(call(model))
    assert_as_stock(outputs[1], outputs[0])
    assert calls_of("linear", lambda: call(model)) == PROJECTIONS


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
@pytest.mark.gradients
def test_gradients_are_stocks(checkpointing):
    results = []
    for prepare in (lambda model: model, fastsd.patch):
        model = prepare(encoder()).requires_grad_().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert calls_of("linear", lambda model=model: model(IDS).last_hidden_state.square().sum().backward()) == 0
        results.append([p.grad for p in model.parameters()])
    for fast, stock in zip(*results, strict=True):
        torch.testing.assert_close(fast, stock, rtol=1e-4, atol=1e-4)


def test_compiled():
    stock = call(encoder())
    model = fastsd.patch(encoder())
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: model(ids).last_hidden_state, fullgraph=True, backend="eager")
    assert_as_stock(flat_output(compiled(IDS)), flat_output(encoder()(IDS).last_hidden_state))
    assert_as_stock(call(model), stock)


def test_image_encoders_have_the_same_layers():
    def images():
        torch.manual_seed(0)
        config = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4, projection_dim=16)
        return randomised(CLIPVisionModelWithProjection(config))

    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    stock = flat_output(images()(pixels).to_tuple())
    model = fastsd.patch(images(), strict=True)
    assert_as_stock(flat_output(model(pixels).to_tuple()), stock)
    assert calls_of("linear", lambda: model(pixels)) == PROJECTIONS


def test_in_a_pipeline_and_in_copies(tmp_path):
    pipe = fastsd.patch(Pipeline(unet=build(), text_encoder=encoder()), strict=True)
    model, stock = pipe.components["text_encoder"], call(encoder())
    for copied in (copy.deepcopy(model), (model.save_pretrained(tmp_path), CLIPTextModel.from_pretrained(tmp_path))[1]):
        assert {type(layer) for layer in layers(copied)} == {modeling_clip.CLIPEncoderLayer}
        assert {type(layer.self_attn) for layer in layers(copied)} == {modeling_clip.CLIPAttention}
        assert torch.equal(call(copied), stock)
    assert calls_of("linear", lambda: call(model)) == PROJECTIONS


def test_report():
    assert str(fastsd.report(fastsd.patch(encoder()))).splitlines() == [
        "CLIPTextModel",
        "  CLIPEncoderLayer     3  replaced by clip_layer → linear [cpu]",
        "  CLIPAttention        3  replaced by clip_attention → linear [cpu]",
        "  Embedding            2  left: no rule for this class",
        "  LayerNorm            1  left: no rule for this class",
    ]


def test_layers_of_another_release_are_left(monkeypatch):
    class OfTransformers4(nn.Module):
        def forward(self, hidden_states, attention_mask, causal_attention_mask, output_attentions=False):
            raise NotImplementedError

    assert text_encoder.takes_what_is_known(modeling_clip.CLIPEncoderLayer)
    assert not text_encoder.takes_what_is_known(OfTransformers4)
    monkeypatch.setattr(text_encoder, "_IS_KNOWN", False)
    model = encoder()
    with pytest.warns(UserWarning, match=r"left 6 modules.*its forward is not that of transformers 5"):
        fastsd.patch(model)
    assert {type(layer) for layer in layers(model)} == {modeling_clip.CLIPEncoderLayer}
