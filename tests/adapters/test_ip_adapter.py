"""IP-Adapter of the full model: each cross-attention of a pruned U-Net gets the weights that are meant for it."""

import pytest
import torch

import fastsd
from fastsd.adapters import fit_ip_adapter, origin_of
from fastsd.adapters.origin import attentions_of
from tests.adapters.models import WHEN, full_of, patched_around, pruned, relative_error
from tests.combinations import each_value, long
from tests.compress.models import SMALL_XL, build, call, shared
from tests.patching.gri import ip_adapter


def weights(model):
    """Of each cross-attention, by its path."""
    return {
        name.removesuffix(".processor"): (processor.to_k_ip[0].weight, processor.to_v_ip[0].weight)
        for name, processor in model.attn_processors.items()
        if hasattr(processor, "to_k_ip")
    }


def misassigned(small, full):
    """How many cross-attentions have other weights than theirs in the full model; both have the IP-Adapter."""
    expected, known = weights(full), origin_of(small)
    return sum(
        not all(map(torch.equal, given, expected[known.source_of(path)])) for path, given in weights(small).items()
    )


@pytest.mark.parametrize("name", ["bk-sdm-tiny", "bypassed", *long("bk-sdm-small", "ssd-1b")])
def test_by_name(name):
    full = full_of(name)
    small = pruned(name)
    torch.manual_seed(7)
    state = ip_adapter(full)
    fitted, report = fit_ip_adapter(state, small)
    full._load_ip_adapter_weights(state)
    small._load_ip_adapter_weights(fitted)
    assert len(weights(small)) == len(attentions_of(small)) // 2
    assert misassigned(small, full) == 0
    assert {*report.used, *report.skipped} == set(weights(full))
    assert {origin_of(small).source_of(path) for path in weights(small)} == set(report.used)
    assert fitted["image_proj"] is state["image_proj"]


def test_by_ordinal():
    """What diffusers does with SDXL's file on SSD-1B where no width differs, so that it finds no fault."""
    full = build(SMALL_XL)
    small = fastsd.compress(full, "ssd-1b")
    state = ip_adapter(full)
    full._load_ip_adapter_weights(state)
    small._load_ip_adapter_weights(state)
    # of 4 + 8 + 18 + 4, all but the first four and the three of ten behind them
    assert len(weights(small)) == 34
    assert misassigned(small, full) == 27
    small.set_default_attn_processor()
    small.encoder_hid_proj = None
    small._load_ip_adapter_weights(fit_ip_adapter(state, small)[0])
    assert misassigned(small, full) == 0


@each_value("name,when", ["bk-sdm-small", "a-sdm"], WHEN)
def test_with_patch(name, when):
    torch.manual_seed(7)
    state = ip_adapter(shared())
    inputs = {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 6)]}}
    plain, expected = pruned(name), pruned(name)
    fitted, _ = fit_ip_adapter(state, expected)
    expected._load_ip_adapter_weights(fitted)

    def load(small):
        again, _ = fit_ip_adapter(state, small)
        assert again["ip_adapter"].keys() == fitted["ip_adapter"].keys()
        small._load_ip_adapter_weights(again)

    small = patched_around(pruned(name), when, load)
    assert relative_error(call(small, **inputs), call(expected, **inputs)) < 1e-4
    assert relative_error(call(small, **inputs), call(plain)) > 1e-3


def face_id(full):
    """FaceID Plus: a LoRA at every number, and another projection."""
    state = ip_adapter(full)
    lora = {
        f"{number}.{layer}_lora.{part}.weight": torch.randn(2, 2)
        for number in range(len(full.attn_processors))
        for layer in ("to_q", "to_k", "to_v", "to_out")
        for part in ("down", "up")
    }
    projection = {"perceiver_resampler.proj_in.weight": torch.ones(2, 2)}
    return {"image_proj": projection, "ip_adapter": state["ip_adapter"] | lora}


@pytest.mark.parametrize("name", ["bk-sdm-tiny", *long("ssd-1b")])
def test_face_id(name):
    """Its LoRA goes by number over self-attentions, too."""
    full = full_of(name)
    small = pruned(name)
    state = face_id(full)
    fitted, report = fit_ip_adapter(state, small)
    (expected,) = full._load_ip_adapter_loras([state]).values()
    (given,) = small._load_ip_adapter_loras([fitted]).values()
    known = origin_of(small)
    assert len(given) == 8 * len(small.attn_processors)
    for key, value in given.items():
        assert value is expected["unet." + known.source_of(key.removeprefix("unet."))]
    assert len(report.used) == len(small.attn_processors)
    assert fitted["image_proj"] is state["image_proj"]


def test_flat_names():
    full, small = shared(), pruned("bk-sdm-small")
    state = ip_adapter(full)
    flat = {f"{part}.{key}": value for part, of in state.items() for key, value in of.items()}
    fitted, report = fit_ip_adapter(flat, small)
    nested, same = fit_ip_adapter(state, small)
    assert fitted.keys() == nested.keys() == {"image_proj", "ip_adapter"}
    assert {key: value.data_ptr() for key, value in fitted["ip_adapter"].items()} == {
        key: value.data_ptr() for key, value in nested["ip_adapter"].items()
    }
    assert fitted["image_proj"].keys() == state["image_proj"].keys()
    assert report == same
    assert str(report).startswith("IP-Adapter: 9 of 16 places are used; this U-Net does not have the others")
    all_of_it, report = fit_ip_adapter(state, full)
    assert all_of_it["ip_adapter"].keys() == state["ip_adapter"].keys()
    assert not report.skipped


def test_refusals():
    full, small = shared(), pruned("bk-sdm-base")
    state = ip_adapter(full)
    with pytest.raises(ValueError, match="the parts of an IP-Adapter, image_proj and ip_adapter; got unet"):
        fit_ip_adapter({"unet.conv_in.weight": torch.ones(1)}, small)
    with pytest.raises(TypeError, match="state_dict: expected a mapping; got str"):
        fit_ip_adapter("a-file", small)
    with pytest.raises(TypeError, match="image_proj: expected a mapping from names to tensors; got NoneType"):
        fit_ip_adapter({"image_proj": None, "ip_adapter": None}, small)
    with pytest.raises(TypeError, match="ip_adapter: expected a mapping from names to tensors; got list"):
        fit_ip_adapter({**state, "ip_adapter": []}, small)
    with pytest.raises(TypeError, match=r"ip_adapter: expected a tensor for '1\.to_k_ip\.weight'; got str"):
        fit_ip_adapter({**state, "ip_adapter": state["ip_adapter"] | {"1.to_k_ip.weight": "x"}}, small)
    with pytest.raises(TypeError, match="ip_adapter: expected names that are strings; got 1"):
        fit_ip_adapter({**state, "ip_adapter": {1: torch.ones(1)}}, small)
    with pytest.raises(TypeError, match="state_dict: expected names that are strings; got 1"):
        fit_ip_adapter({1: torch.ones(1)}, small)
    fewer = {key: value for key, value in state["ip_adapter"].items() if not key.startswith("31.")}
    with pytest.raises(
        ValueError, match=r"expected 31\.to_k_ip\.weight of the shape \(32, 8\), for mid_block.*; got none"
    ):
        fit_ip_adapter({**state, "ip_adapter": fewer}, small)
    with pytest.raises(ValueError, match=r"one of the 32 attention modules .*; got '33.to_k_ip.weight'"):
        fit_ip_adapter({**state, "ip_adapter": state["ip_adapter"] | {"33.to_k_ip.weight": torch.ones(1)}}, small)
    # one that was made for SD2.x, say
    wider = {key: value.repeat(1, 2) for key, value in state["ip_adapter"].items()}
    with pytest.raises(ValueError, match=r"1\.to_k_ip\.weight of the shape \(8, 8\), .*; got \(8, 16\)"):
        fit_ip_adapter({**state, "ip_adapter": wider}, small)
