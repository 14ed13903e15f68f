"""Blocks of transformers: norms and sums inside the products beside them, and stock where more is asked for."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

import fastsd
from fastsd.nn.replacement import settings_of
from fastsd_kernels.linear import cpu_speed
from tests.patching.models import OpCalls, assert_as_stock, build, call, calls_of

pytestmark = pytest.mark.usefixtures("_own_product")

# what torch does without a fused block
FUSED = ("aten::native_layer_norm", "aten::add", "aten::addmm", "aten::gelu")

LIKE = {"generator": torch.Generator().manual_seed(1)}
X, TEXT = torch.randn(2, 30, 24, **LIKE), torch.randn(2, 7, 10, **LIKE)
BOXES = {"gligen": {"objs": torch.randn(2, 3, 10, **LIKE)}}
MASK = torch.zeros(2, 1, 30).masked_fill(torch.arange(30) > 20, -10000.0)


def layer(**changes):
    torch.manual_seed(0)
    given = {"dim": 24, "num_attention_heads": 3, "attention_head_dim": 8, "cross_attention_dim": 10} | changes
    model = nn.ModuleList([BasicTransformerBlock(**given)]).eval()
    for norm in (each for each in model.modules() if isinstance(each, nn.LayerNorm) and each.elementwise_affine):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return model.requires_grad_(False)


def assert_equal(fast, stock):
    assert fast.stride() == stock.stride()
    torch.testing.assert_close(fast, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_faster", [False, True])
@pytest.mark.parametrize(
    ("changes", "given"),
    [
        pytest.param({}, {}, id="cross"),
        pytest.param({"cross_attention_dim": None}, {"encoder_hidden_states": None}, id="self_alone"),
        pytest.param({"cross_attention_dim": None, "double_self_attention": True}, {}, id="self_twice"),
        pytest.param({"only_cross_attention": True}, {}, id="only_cross"),
        pytest.param({"norm_elementwise_affine": False}, {}, id="without_affine"),
        pytest.param({"norm_eps": 0.1, "attention_bias": True}, {}, id="eps_and_bias"),
        pytest.param({"activation_fn": "gelu", "ff_bias": False}, {}, id="gelu"),
        pytest.param({"attention_type": "gated"}, {"cross_attention_kwargs": BOXES}, id="gligen"),
        pytest.param({}, {"attention_mask": MASK}, id="masked"),
        pytest.param({}, {"encoder_attention_mask": MASK[:, :, 17:24]}, id="text_masked"),
        pytest.param({"final_dropout": True, "dropout": 0.5}, {}, id="dropout"),
    ],
)
def test_as_stock(changes, given, is_faster, monkeypatch):
    monkeypatch.setattr(cpu_speed, "_is_faster", is_faster)
    model, given = layer(**changes), {"encoder_hidden_states": TEXT} | given
    if changes.get("double_self_attention"):
        given["encoder_hidden_states"] = None
    stock = model[0](X, **given)
    fastsd.patch(model)
    assert settings_of(model[0]).rule.name == "transformer_block"
    assert_equal(model[0](X, **given), stock)
    assert torch.equal(fastsd.unpatch(model)[0](X, **given), stock)


def test_norms_and_sums_are_in_the_products():
    model = fastsd.patch(layer(), strict=True)
    with OpCalls(*FUSED) as others:
        assert calls_of("linear", lambda: model[0](X, encoder_hidden_states=TEXT)) == 2 * 4 + 2
    assert others.names == []


def test_a_norm_is_computed_once_for_projections_that_are_called():
    model = fastsd.patch(layer())
    model[0].attn1.to_k = nn.Sequential(model[0].attn1.to_k)
    stock = layer()[0](X, encoder_hidden_states=TEXT)
    with OpCalls(*FUSED) as others:
        assert_equal(model[0](X, encoder_hidden_states=TEXT), stock)
    assert others.names.count("aten::native_layer_norm") == 1


@pytest.mark.parametrize("path", ["attn1", "attn2", "ff"])
def test_what_is_compiled_by_itself_is_called(path):
    model, graphs = fastsd.patch(layer()), []
    model[0].get_submodule(path).compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    assert_equal(model[0](X, encoder_hidden_states=TEXT), layer()[0](X, encoder_hidden_states=TEXT))
    assert graphs


def test_chunks_of_the_feed_forward_layer():
    model = fastsd.patch(layer())
    model[0].set_chunk_feed_forward(5, 1)
    assert_equal(model[0](X, encoder_hidden_states=TEXT), layer()[0](X, encoder_hidden_states=TEXT))


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.gradients
def test_gradients_are_stocks(chunks):
    results = []
    for prepare in (lambda model: model, fastsd.patch):
        model = prepare(layer()).requires_grad_().train()
        if chunks:
            model[0].set_chunk_feed_forward(5, 1)
        x = X.clone().requires_grad_()
        model[0](x, encoder_hidden_states=TEXT).square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    for fast, stock in zip(*results, strict=True):
        torch.testing.assert_close(fast, stock, rtol=1e-4, atol=1e-5)


def test_other_kinds_are_left_alone():
    holder = nn.ModuleList([*layer(norm_type="ada_norm", num_embeds_ada_norm=4), *layer()])
    fastsd.patch(holder, strict=True)
    assert settings_of(holder[0]) is None
    assert settings_of(holder[1]) is not None
    stock = layer(norm_type="ada_norm", num_embeds_ada_norm=4)
    given = {"encoder_hidden_states": TEXT, "timestep": torch.tensor(1)}
    assert_equal(holder[0](X, **given), stock[0](X, **given))


def test_transforms_change_nothing():
    model, stock = fastsd.patch(layer()), layer()
    fast, expected = (
        torch.func.vmap(lambda x, m=m: m[0](x[None], encoder_hidden_states=TEXT[:1])[0])(X) for m in (model, stock)
    )
    torch.testing.assert_close(fast, expected)


@pytest.mark.parametrize("name", ["unet", "controlnet", "linear_projections"])
def test_every_block_of_a_model(name):
    model = build(name)
    expected = call(model)
    fastsd.patch(model, strict=True)
    with OpCalls(*FUSED) as others:
        assert_as_stock(call(model), expected)
    assert "aten::native_layer_norm" not in others.names


def test_row_10_compiled():
    expected, model = call(build("cross_up")), fastsd.patch(build("cross_up"))
    model.compile(fullgraph=True, backend="aot_eager")
    assert_as_stock(call(model), expected)
