"""Strengths of adapters by layer, also where those of diffusers fail: levels of a different number of layers."""

import diffusers
import pytest
import torch

import fastsd
from fastsd.adapters import fit_ip_adapter, fit_lora, set_adapters, set_ip_adapter_scale
from fastsd.adapters.origin import attentions_of
from tests.adapters.models import WHEN, patched_around, pruned, relative_error
from tests.adapters.test_lora import SOME, lora_of
from tests.adapters.test_pipelines import pipeline_of
from tests.combinations import each_value, long
from tests.compress.models import call, shared
from tests.patching.gri import ip_adapter

# as A-SDM without the mixed kernels: a stock U-Net
SHORT = fastsd.Plan(
    removed=tuple(
        f"{block}.{kind}.1" for block in ("down_blocks.0", "up_blocks.3") for kind in ("resnets", "attentions")
    )
)
UNEQUAL = ("stock", "a-sdm")


def small_of(name):
    return fastsd.compress(shared(), SHORT if name == "stock" else name)


def with_images(small, count=1):
    torch.manual_seed(7)
    fitted, _ = fit_ip_adapter(ip_adapter(shared()), small)
    small._load_ip_adapter_weights([fitted] * count if count > 1 else fitted)
    return small


def scales_of(small):
    return {
        name.removesuffix(".processor"): processor.scale
        for name, processor in small.attn_processors.items()
        if hasattr(processor, "to_k_ip")
    }


def call_with_images(small):
    generator = torch.Generator().manual_seed(8)
    return call(small, added_cond_kwargs={"image_embeds": [torch.randn(2, 1, 6, generator=generator)]})


@each_value("name,when", UNEQUAL, WHEN)
def test_ip_adapter_on_levels_of_different_length(name, when):
    plain = small_of(name)
    small = patched_around(small_of(name), when, with_images)
    assert small.config.layers_per_block == [1, 2, 2, 2]
    with pytest.raises(TypeError, match="can only concatenate list"):
        pipeline_of(small, None).set_ip_adapter_scale(0.5)
    whole = call_with_images(small)
    set_ip_adapter_scale(small, 0.5)
    assert {tuple(scale) for scale in scales_of(small).values()} == {(0.5,)}
    half = call_with_images(small)
    assert relative_error(half, whole) > 1e-4
    set_ip_adapter_scale(small, 0)
    assert relative_error(call_with_images(small), call(plain)) < 1e-4


def test_ip_adapter_as_diffusers_does():
    """Where both can: the same."""
    small, other = with_images(pruned("bk-sdm-base")), with_images(pruned("bk-sdm-base"))
    pipe = pipeline_of(other, None)
    for theirs, ours in (
        (0.5, 0.5),
        (
            {"down": {"block_2": [0.25]}, "up": {"block_1": [0.0, 2.0]}, "mid": 0.75},
            {"down_blocks.2": 0.25, "up_blocks.1.attentions.1": 2, "mid_block": 0.75},
        ),
        ({"up": 0.5}, {"up_blocks": 0.5}),
    ):
        pipe.set_ip_adapter_scale(theirs)
        set_ip_adapter_scale(small, ours)
        assert scales_of(small) == scales_of(other)
    # the nearest name counts
    set_ip_adapter_scale(small, {"up_blocks.1.attentions.1": 2.0, "up_blocks": 0.5})
    found = scales_of(small)
    assert found["up_blocks.1.attentions.1.transformer_blocks.0.attn2"] == [2.0]
    assert found["up_blocks.1.attentions.0.transformer_blocks.0.attn2"] == [0.5]
    assert found["mid_block.attentions.0.transformer_blocks.0.attn2"] == [0.0]


@pytest.mark.parametrize("name", ["bk-sdm-tiny", *long("bk-sdm-small")])
def test_without_a_mid_block(name):
    """Where diffusers takes a number, and no dict."""
    small = with_images(with_loras(small_of(name)))
    pipe = pipeline_of(small, None)
    pipe.set_ip_adapter_scale(0.5)
    small.set_adapters(["one"], weights=[0.5])
    with pytest.raises(ValueError, match="Can't set lora scale for layer mid"):
        pipe.set_ip_adapter_scale({"up": 0.25})
    with pytest.raises(ValueError, match="Can't set lora scale for layer mid"):
        small.set_adapters(["one"], weights=[{"up": 0.25}])
    set_ip_adapter_scale(small, {"up_blocks": 0.25})
    assert all(scale == [0.25 if path.startswith("up") else 0.0] for path, scale in scales_of(small).items())
    set_adapters(small, "one", {"up_blocks": 0.25})
    assert all(scale == (0.25 if path.startswith("up") else 1.0) for path, scale in scaled(small, "one").items())


def test_several_ip_adapters():
    small = with_images(small_of("a-sdm"), count=2)
    set_ip_adapter_scale(small, [0.5, {"mid_block": 2.0}])
    found = scales_of(small)
    assert found.pop("mid_block.attentions.0.transformer_blocks.0.attn2") == [0.5, 2.0]
    assert all(scale == [0.5, 0.0] for scale in found.values())
    set_ip_adapter_scale(small, 0.25)
    assert all(scale == [0.25, 0.25] for scale in scales_of(small).values())
    with pytest.raises(ValueError, match="scale: expected one for each of the 2 IP-Adapters; got 1"):
        set_ip_adapter_scale(small, [0.5])
    with pytest.raises(ValueError, match=r"scale: expected beginnings of paths .*it has none for 'down_blocks\.7'"):
        set_ip_adapter_scale(small, [1.0, {"down_blocks.7": 1.0}])
    with pytest.raises(TypeError, match="scale: expected a number, or numbers by the beginnings of paths; got str"):
        set_ip_adapter_scale(small, [1.0, "much"])
    with pytest.raises(TypeError, match="scale: expected a number, or numbers by the beginnings of paths; got list"):
        set_ip_adapter_scale(small, {"mid_block": [1.0]})
    assert all(scale == [0.25, 0.25] for scale in scales_of(small).values())
    with pytest.raises(ValueError, match="unet: expected one with an IP-Adapter; got none"):
        set_ip_adapter_scale(small_of("a-sdm"), 0.5)


def test_face_id_on_levels_of_different_length():
    """Diffusers fails when it sets the strength of its LoRA; all is loaded then."""
    full, small = shared(), small_of("stock")
    state = ip_adapter(full)
    for number, path in enumerate(attentions_of(full)):
        layer = full.get_submodule(path)
        for name, linear in (("q", layer.to_q), ("k", layer.to_k), ("v", layer.to_v), ("out", layer.to_out[0])):
            outputs, inputs = linear.weight.shape
            state["ip_adapter"][f"{number}.to_{name}_lora.down.weight"] = torch.randn(2, inputs)
            state["ip_adapter"][f"{number}.to_{name}_lora.up.weight"] = torch.randn(outputs, 2)
    fitted, _ = fit_ip_adapter(state, small)
    with pytest.raises(TypeError, match="can only concatenate list"):
        pipeline_of(small, None).load_ip_adapter(fitted, subfolder="", weight_name="", image_encoder_folder=None)
    loaded = call_with_images(small)
    set_adapters(small, "faceid_0", 1.0)
    assert torch.equal(call_with_images(small), loaded)
    set_adapters(small, "faceid_0", 0.0)
    assert relative_error(call_with_images(small), loaded) > 1e-3


def with_loras(small, targets=SOME):
    """Two of them."""
    lora = lora_of("", targets)
    for name, factor in (("one", 1.0), ("two", -0.5)):
        fitted, _ = fit_lora({key: factor * value if "lora_B" in key else value for key, value in lora.items()}, small)
        small.load_lora_adapter(fitted, prefix=None, adapter_name=name)
    return small


def scaled(small, name):
    return {
        path: module.scaling[name] for path, module in small.named_modules() if name in getattr(module, "scaling", ())
    }


@each_value("name,when", UNEQUAL, WHEN)
def test_lora_on_levels_of_different_length(name, when):
    plain = small_of(name)
    # of every kind of layer, so also of those that are in no block
    small = patched_around(small_of(name), when, lambda small: with_loras(small, (*SOME, "conv_in", "linear_1")))
    # on the stock class any, on the other one by layer, or where a layer is in no block
    with pytest.raises((TypeError, IndexError)):
        small.set_adapters(["one"], weights=[{"up": {"block_1": [1.0, 0.0, 1.0]}}])
    set_adapters(small, ["one", "two"], [0.5, 1.0])
    assert relative_error(call(small), call(plain)) < 1e-4
    set_adapters(small, "one")
    assert small.active_adapters() == ["one"]
    whole = call(small)
    assert relative_error(whole, call(plain)) > 1e-3
    set_adapters(small, "one", {"up_blocks": 0.5, "up_blocks.1.attentions.1": 0, "conv_in": 0.25})
    assert relative_error(call(small), whole) > 1e-4
    for path, scale in scaled(small, "one").items():
        nearest = 0.0 if path.startswith("up_blocks.1.attentions.1.") else 0.5 if path.startswith("up_blocks") else 1.0
        assert scale == (0.25 if path == "conv_in" else nearest)


def test_lora_as_diffusers_does():
    small, other = (with_loras(pruned("bk-sdm-base"), ("to_q", "ff.net.2", "proj_in")) for _ in range(2))
    other.set_adapters(["one", "two"], weights=[{"up": {"block_1": [0.0, 2.0]}, "mid": 0.5}, 0.5])
    set_adapters(
        small,
        ["one", "two"],
        [{"up_blocks.1.attentions.0": 0, "up_blocks.1.attentions.1": 2, "mid_block.attentions": 0.5}, 0.5],
    )
    assert scaled(small, "one") == scaled(other, "one")
    assert scaled(small, "two") == scaled(other, "two")
    assert torch.equal(call(small), call(other))


def test_refusals():
    small = with_loras(small_of("a-sdm"))
    before = scaled(small, "one")
    with pytest.raises(ValueError, match=r"names: expected adapters of this U-Net, one, two; got one, three"):
        set_adapters(small, ["one", "three"], 0.5)
    with pytest.raises(ValueError, match="scale: expected one for each of the 2 adapters; got 1"):
        set_adapters(small, ["one", "two"], [0.5])
    with pytest.raises(ValueError, match=r"scale: expected beginnings of paths .*it has none for 'up_blocks\.1\.att'"):
        set_adapters(small, ["one", "two"], [0.5, {"up_blocks.1.att": 1.0}])
    assert scaled(small, "one") == before
    with pytest.raises(ValueError, match="names: expected adapters of this U-Net, which has none; got one"):
        set_adapters(small_of("a-sdm"), "one", 0.5)
    with pytest.raises(TypeError, match="unet: expected a diffusers UNet2DConditionModel; got StableDiffusion"):
        set_adapters(
            diffusers.StableDiffusionControlNetPipeline.__new__(diffusers.StableDiffusionControlNetPipeline), "one", 0.5
        )
