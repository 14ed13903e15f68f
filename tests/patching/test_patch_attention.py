"""Attention layers: the op between the projections, and stock where something else is asked for."""

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import nn

import fastsd
from fastsd.nn.replacement import settings_of
from fastsd_kernels.linear import cpu_speed
from tests.patching.models import assert_as_stock, build, call, calls_of

LIKE = {"generator": torch.Generator().manual_seed(1)}
X, TEXT = torch.randn(2, 30, 24, **LIKE), torch.randn(2, 7, 10, **LIKE)
MAP = torch.randn(2, 24, 5, 6, **LIKE)
OF_A_MAP = {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.5, "bias": True}


def op_calls(function):
    return calls_of("attention", function)


def layer(*, is_packed=False, **changes):
    torch.manual_seed(0)
    given = {"query_dim": 24, "heads": 3, "dim_head": 8} | changes
    attn = Attention(**given)
    if is_packed:
        attn.fuse_projections()
        attn.set_processor(FusedAttnProcessor2_0())
    return nn.ModuleList([attn]).eval().requires_grad_(False)


@pytest.mark.parametrize("is_faster", [False, True])
@pytest.mark.parametrize(
    ("changes", "given"),
    [
        pytest.param({}, (X,), id="plain"),
        pytest.param({"bias": True, "out_bias": False}, (X,), id="bias"),
        pytest.param({"cross_attention_dim": 10}, (X, TEXT), id="cross"),
        pytest.param({"cross_attention_dim": 10, "cross_attention_norm": "layer_norm"}, (X, TEXT), id="cross_norm"),
        pytest.param({"qk_norm": "layer_norm"}, (X,), id="qk_norm"),
        pytest.param({"heads": 1, "dim_head": 40}, (X.mT.contiguous().mT,), id="transposed"),
        pytest.param({"residual_connection": True}, (X,), id="residual"),
        pytest.param(OF_A_MAP, (MAP,), id="map"),
        pytest.param(OF_A_MAP, (MAP.contiguous(memory_format=torch.channels_last),), id="channels_last"),
        pytest.param({"processor": AttnProcessor(), "scale_qk": False}, (X,), id="unscaled"),
        pytest.param({"is_packed": True, "bias": True, "scale_qk": False}, (X,), id="packed"),
        pytest.param({"is_packed": True, "cross_attention_dim": 10}, (X, TEXT), id="packed_cross"),
        pytest.param({"is_packed": True, "qk_norm": "layer_norm"}, (X,), id="packed_qk_norm"),
        pytest.param({"is_packed": True} | OF_A_MAP, (MAP,), id="packed_map"),
        # which has no norms of queries and keys
        pytest.param({"processor": AttnProcessor(), "qk_norm": "layer_norm"}, (X,), id="qk_norm_of_another"),
    ],
)
def test_as_stock(changes, given, is_faster, monkeypatch):
    monkeypatch.setattr(cpu_speed, "_is_faster", is_faster)
    model = layer(**changes)
    stock = model[0](*given)
    fastsd.patch(model, strict=True)
    assert op_calls(lambda: model[0](*given)) == 1
    fast = model[0](*given)
    torch.testing.assert_close(fast, stock, rtol=1e-5, atol=2e-6)
    assert fast.stride() == stock.stride() or fast.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(fastsd.unpatch(model)[0](*given), stock)


@pytest.mark.parametrize(
    "change",
    [
        lambda attn: attn.to_qkv.register_forward_hook(lambda module, args, y: 2 * y),
        lambda attn: attn.to_qkv.weight.mul_(1.5),
        lambda attn: attn.to_k.weight.mul_(1.5),  # which nobody reads
        lambda attn: attn.set_processor(AttnProcessor2_0()),
    ],
    ids=["hook", "weight", "old_weight", "processor"],
)
def test_changes_of_packed_projections(change):
    stock, model = layer(is_packed=True), fastsd.patch(layer(is_packed=True))
    for each in (stock, model):
        each[0](X)
        change(each[0])
    torch.testing.assert_close(model[0](X), stock[0](X), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("of", ["class", "instance"])
@pytest.mark.filterwarnings("ignore:fastsd.patch left")
def test_a_step_of_the_older_processor_that_is_overwritten(when, of, monkeypatch):
    outputs, scores = [], Attention.get_attention_scores
    for prepare in (lambda model: model, fastsd.patch):
        model = layer(processor=AttnProcessor())
        model = prepare(model) if when == "after" else model
        with monkeypatch.context() as patch:
            if of == "class":
                patch.setattr(Attention, "get_attention_scores", lambda self, *args: 3 * scores(self, *args))
            else:
                model[0].get_attention_scores = lambda *args, attn=model[0]: 3 * scores(attn, *args)
            model = prepare(model) if when == "before" else model
            outputs.append(model[0](X))
    assert torch.equal(*outputs)


def test_text_that_the_op_does_not_take():
    stock, model = layer(cross_attention_dim=10), fastsd.patch(layer(cross_attention_dim=10))
    for text in (TEXT[:, :0], TEXT[:1].expand(4, -1, -1)):
        results = []
        for each in (stock, model):
            try:
                results.append(each[0](X, text))
            except RuntimeError as error:
                results.append(str(error))
        assert str(results[0]) == str(results[1])


def test_masks_and_other_arguments_are_stock():
    model = layer()
    mask = torch.zeros(2, 1, 30)
    mask[:, :, 20:] = -10000.0
    expected = model[0](X, attention_mask=mask)
    fastsd.patch(model)
    assert op_calls(lambda: model[0](X, attention_mask=mask)) == 0
    assert torch.equal(model[0](X, attention_mask=mask), expected)


@pytest.mark.parametrize(
    "changes",
    [{"added_kv_proj_dim": 6, "only_cross_attention": True}, {"kv_heads": 1}, {"spatial_norm_dim": 4, "query_dim": 32}],
    ids=str,
)
def test_other_kinds_are_left_alone(changes):
    holder = nn.ModuleList([*layer(**changes), *layer()])
    fastsd.patch(holder, strict=True)
    assert settings_of(holder[0]) is None
    assert settings_of(holder[1]) is not None


def test_another_processor_is_refused():
    model = layer()
    model[0].set_processor(SlicedAttnProcessor(1))
    with pytest.raises(fastsd.PatchError, match="its processor is a SlicedAttnProcessor, expected diffusers' Attn"):
        fastsd.patch(model, strict=True)


@pytest.mark.parametrize(
    ("name", "calls", "is_packed"),
    [
        ("unet", 8, False),
        ("unet", 8, True),
        ("controlnet", 4, False),
        ("unet_2d_model", 4, False),
        ("vae", 2, False),
        ("vae", 2, True),
    ],
)
def test_every_attention_of_a_model(name, calls, is_packed):
    model = build(name)
    if is_packed:
        model.fuse_qkv_projections()
    expected = call(model)
    fastsd.patch(model, strict=True)
    assert op_calls(lambda: call(model)) == calls
    assert_as_stock(call(model), expected)
