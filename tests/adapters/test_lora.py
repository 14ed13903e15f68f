"""LoRA of the full model: on a pruned U-Net it does what it does to what is left of the full one."""

import functools

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

import fastsd
from fastsd.adapters import Compression, fit_lora, origin_of
from tests.adapters.models import WHEN, patched_around, pruned, relative_error
from tests.combinations import each_value, long
from tests.compress.models import PLANS, build, call, for_recipe, shared

EVERYWHERE = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv", "conv_in", "conv_out", "linear_1"),
)
# of each kind one
SOME = ("to_q", "ff.net.2", "proj_in", "conv1", "conv_shortcut")
TARGETS = {"a-sdm": EVERYWHERE, "ssd-1b": ("to_q",)}


@functools.cache
def lora_of(name="", targets=EVERYWHERE):
    """A random LoRA for the full model of a recipe, as PEFT names it; all tests share it."""
    full = for_recipe(name)
    torch.manual_seed(5)
    full.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=list(targets), init_lora_weights=False))
    return get_peft_model_state_dict(full)


def layer(key):
    return key.split(".lora_")[0]


def fused(name, state):
    """What a recipe makes of the full model with a LoRA inside."""
    tuned = for_recipe(name)
    tuned.load_lora_adapter(dict(state), prefix=None)
    tuned.fuse_lora()
    tuned.unload_lora()
    return fastsd.compress(tuned, PLANS.get(name, name), in_place=True)


def kohya(state, alpha=None):
    """As kohya writes it."""
    found = {}
    for key, value in state.items():
        name = "lora_unet_" + layer(key).replace(".", "_")
        found[f"{name}.{'lora_down' if 'lora_A' in key else 'lora_up'}.weight"] = value
        if alpha is not None:
            found[f"{name}.alpha"] = torch.tensor(alpha(key))
    return found


def load_as_pipelines_do(unet, state):
    pipeline = diffusers.StableDiffusionPipeline
    converted, alphas = pipeline.lora_state_dict(dict(state), unet_config=unet.config)
    pipeline.load_lora_into_unet(converted, alphas, unet)


@pytest.mark.parametrize("name", ["bk-sdm-tiny", "a-sdm", *long("bk-sdm-small", "ssd-1b", "bypassed")])
def test_as_fused_before(name):
    """Fused into the full model, which is compressed then, or fitted to the compressed one: the same."""
    state = lora_of(name, TARGETS.get(name, SOME))
    small = pruned(name)
    base = call(small)
    fitted, report = fit_lora(state, small)
    assert {*report.used, *report.skipped} == {layer(key) for key in state}
    assert len(fitted) == 2 * len(report.used)
    assert report.skipped
    # a convolution that mixes kernels takes none of it
    experts = Compression.of(small).plan.experts
    mixed = set(experts) | {conv for of in experts.values() for conv in of}
    assert mixed <= set(report.skipped)
    expected = call(fused(name, {key: state[key] for key in state if layer(key) not in mixed}))
    small.load_lora_adapter(fitted, prefix=None)
    assert relative_error(call(small), expected) < 1e-4
    assert relative_error(call(small), base) > 1e-2


@each_value("name,when", ["bk-sdm-tiny", "a-sdm"], WHEN)
def test_with_patch(name, when):
    state = lora_of(name, SOME)
    expected = pruned(name)
    fitted, _ = fit_lora(state, expected)
    expected.load_lora_adapter(dict(fitted), prefix=None)

    def load(small):
        # what is patched, and has adapters already, is named as before
        assert fit_lora(state, small)[0].keys() == fitted.keys()
        small.load_lora_adapter(dict(fitted), prefix=None)
        assert fit_lora(state, small)[0].keys() == fitted.keys()

    small = patched_around(pruned(name), when, load)
    assert relative_error(call(small), call(expected)) < 1e-4


def test_names():
    small = pruned("bk-sdm-small")
    state = {
        "unet.up_blocks.0.resnets.2.conv1.lora_A.weight": torch.ones(2, 64, 3, 3),
        "unet.up_blocks.0.resnets.2.conv1.lora_B.weight": torch.ones(32, 2, 1, 1),
        "unet.up_blocks.0.resnets.1.conv1.lora_A.weight": torch.ones(2, 64, 3, 3),
        "unet.up_blocks.0.resnets.1.conv1.lora_B.weight": torch.ones(32, 2, 1, 1),
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 32, 1, 1),
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.ones(32, 2, 1, 1),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight": torch.ones(8, 2),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": torch.ones(2, 8),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 8),
    }
    fitted, report = fit_lora(state, small)
    assert list(fitted) == [
        "unet.up_blocks.0.resnets.1.conv1.lora_A.weight",
        "unet.up_blocks.0.resnets.1.conv1.lora_B.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    ]
    assert all(any(value is given for given in state.values()) for value in fitted.values())
    assert report.skipped == ("up_blocks.0.resnets.1.conv1", "mid_block.attentions.0.proj_in")
    assert str(report) == (
        "LoRA: 2 of 4 places are used; this U-Net does not have the others, which are skipped: "
        "up_blocks.0.resnets.1.conv1, mid_block.attentions.0.proj_in"
    )
    # a full model takes all
    assert str(fit_lora(state, shared())[1]) == "LoRA: all 4 places are used"


TEXT = (
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
)


def test_what_is_not_for_the_unet_is_left_alone():
    small, full = pruned("bk-sdm-small"), shared()
    beside = {f"unet.{name}": value for name, value in halves().items()}
    for key in TEXT:
        state = {key: torch.ones(2, 8)}
        fitted, report = fit_lora(state, small)
        assert fitted == state
        assert (report.used, report.skipped) == ((), ())
        if not key.endswith("alpha"):
            assert fit_lora(state | beside, full)[0] == state | beside


def test_alphas_of_old_names():
    """Stock diffusers loads such a file, and does not look at them."""
    full = shared()
    state = {}
    for key, value in lora_of("", ("to_q", "to_out.0")).items():
        path, part = key.removesuffix(".weight").rsplit(".", 1)
        block, name = path.removesuffix(".0").rsplit(".", 1)
        old = f"unet.{block}.processor.{name}_lora"
        state[f"{old}.{'down' if part == 'lora_A' else 'up'}.weight"] = value
        state[f"{old}.alpha"] = torch.tensor(0.1)
    expected = build()
    load_as_pipelines_do(expected, state)
    fitted, report = fit_lora(state, full)
    assert len(fitted) == 2 * len(report.used) == 2 * len(state) // 3
    given = build()
    load_as_pipelines_do(given, fitted)
    assert torch.equal(call(given), call(expected))
    assert relative_error(call(given), call(full)) > 1e-3


def test_dora_and_bias():
    """What a LoRA may have for a layer beside its two matrices."""
    full = shared()
    for config, part in (
        (LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False, use_dora=True), "magnitude"),
        (LoraConfig(r=2, target_modules=["to_out.0"], init_lora_weights=False, lora_bias=True), "lora_B.bias"),
    ):
        other = build()
        other.add_adapter(config)
        state = get_peft_model_state_dict(other)
        assert any(part in key for key in state)
        assert fit_lora(state, full)[0].keys() == state.keys()
    scale = {"lora_unet_conv_in.dora_scale": torch.ones(8, 1, 1, 1)}
    state = kohya(halves()) | scale
    assert fit_lora(state, full)[0].keys() == state.keys()


def test_kohya():
    """With an alpha for each layer, of which diffusers takes the most frequent for attentions."""

    def alpha(key):
        return 1.0 if "attn" in key else 0.5

    name = "bk-sdm-base"
    state = lora_of(name, SOME)
    scaled = {key: value * (alpha(key) / 2 if "lora_B" in key else 1) for key, value in state.items()}
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8)}
    small = pruned(name)
    fitted, report = fit_lora(kohya(state, alpha) | text, small)
    assert text.items() <= fitted.items()
    assert report == fit_lora(state, small)[1]
    load_as_pipelines_do(small, {key: value for key, value in fitted.items() if key not in text})
    assert relative_error(call(small), call(fused(name, scaled))) < 1e-4


def test_small_alphas_in_half_precision():
    state = {
        "lora_unet_conv_in.lora_down.weight": torch.full((128, 4, 3, 3), 0.02, dtype=torch.float16),
        "lora_unet_conv_in.lora_up.weight": torch.full((8, 128, 1, 1), 0.001, dtype=torch.float16),
        "lora_unet_conv_in.alpha": torch.tensor(1.0),
    }
    fitted, _ = fit_lora(state, shared())
    assert fitted.keys() == state.keys() - {"lora_unet_conv_in.alpha"}
    down, up = (fitted[f"lora_unet_conv_in.lora_{part}.weight"] for part in ("down", "up"))
    assert down.dtype == up.dtype == torch.float16
    given_down, given_up = list(state.values())[:2]
    expected = given_down.double().mean() * given_up.double().mean() / 128
    torch.testing.assert_close(down.double().mean() * up.double().mean(), expected, rtol=1e-6, atol=0)


# names of published LoRAs for SDXL, and the layers that diffusers gives them
SGM = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding.linear_1",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_transformer_blocks_1_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
    "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj": (
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj"
    ),
    "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_2_1_transformer_blocks_3_attn2_to_out_0": (
        "up_blocks.0.attentions.2.transformer_blocks.3.attn2.to_out.0"
    ),
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_1_proj_out": "up_blocks.1.attentions.2.proj_out",
    "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
    "out_2": "conv_out",
}


def test_kohya_of_sdxl():
    full = shared("ssd-1b")
    weights = {path: module.weight for path, module in full.named_modules() if hasattr(module, "weight")}
    state = {
        f"lora_unet_{name}.lora_{part}.weight": torch.ones(
            (2, weights[path].shape[1]) if part == "down" else (weights[path].shape[0], 2)
        )
        for name, path in SGM.items()
        for part in ("down", "up")
    }
    fitted, report = fit_lora(state, full)
    assert report.used == tuple(SGM.values())
    convert = diffusers.StableDiffusionXLPipeline.lora_state_dict
    given, _ = convert(dict(state), unet_config=full.config)
    assert convert(dict(fitted), unet_config=full.config)[0].keys() == given.keys()
    small = pruned("ssd-1b")
    fitted, report = fit_lora(state, small)
    assert report.skipped == (
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
        "mid_block.attentions.0.proj_in",
        "mid_block.resnets.1.conv2",
    )
    # the seventh of ten blocks is the fourth now; the fourth is gone, but not where all ten are left
    assert origin_of(small).source_of("up_blocks.0.attentions.0.transformer_blocks.3").endswith("transformer_blocks.6")
    assert "lora_unet_up_blocks_0_attentions_2_transformer_blocks_3_attn2_to_out_0.lora_up.weight" in fitted


def test_refusals():
    small = pruned("bk-sdm-base")
    shape = torch.ones(2, 4, 3, 3)
    with pytest.raises(ValueError, match=r"it has none for 'unet\.down_blocks\.7\.resnets\.0\.conv1\.lora_A\.weight'"):
        fit_lora({"unet.down_blocks.7.resnets.0.conv1.lora_A.weight": shape}, small)
    with pytest.raises(ValueError, match=r"kohya's names of layers .* it has none for 'lora_unet_input_blocks_99_0"):
        fit_lora({"lora_unet_input_blocks_99_0_op.lora_down.weight": shape}, small)
    with pytest.raises(ValueError, match=r"expected 4 inputs for 'conv_in.lora_A.weight', .*; got 5"):
        fit_lora({"conv_in.lora_A.weight": torch.ones(2, 5, 3, 3)}, small)
    with pytest.raises(ValueError, match=r"expected 8 outputs for 'lora_unet_conv_in.lora_up.weight', .*; got 9"):
        fit_lora({"lora_unet_conv_in.lora_up.weight": torch.ones(9, 2, 1, 1)}, small)
    with pytest.raises(TypeError, match="state_dict: expected a mapping from names to tensors; got str"):
        fit_lora("a-file", small)
    with pytest.raises(TypeError, match="state_dict: expected names that are strings; got 1"):
        fit_lora({1: shape}, small)
    with pytest.raises(TypeError, match=r"state_dict: expected a tensor for 'conv_in.lora_A.weight'; got list"):
        fit_lora({"conv_in.lora_A.weight": [1.0]}, small)


def halves(name="conv_in", *, down=(2, 4, 3, 3), up=(8, 2, 1, 1), names=("lora_A", "lora_B")):
    return {f"{name}.{names[0]}.weight": torch.ones(down), f"{name}.{names[1]}.weight": torch.ones(up)}


KOHYA_CONV_IN = halves("lora_unet_conv_in", names=("lora_down", "lora_up"))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (halves(down=(4,)), r"two dimensions or more for 'conv_in\.lora_A\.weight'; got the shape \(4,\)"),
        (halves(up=()), r"two dimensions or more for 'conv_in\.lora_B\.weight'; got the shape \(\)"),
        (halves(down=(3, 4, 3, 3)), "conv_in .*of one rank.*; got 3 and 2"),
        (halves(down=(0, 4, 3, 3), up=(8, 0, 1, 1)), "conv_in .*of one rank.*; got 0 and 0"),
        ({"conv_in.lora_A.weight": torch.ones(2, 4, 3, 3)}, r"two matrices, .* for conv_in; got 'conv_in\.lora_A"),
        ({"conv_in.lora_B.bias": torch.ones(8)}, r"two matrices, .* for conv_in; got 'conv_in\.lora_B\.bias'"),
        (
            {"lora_unet_conv_in.alpha": torch.tensor(1.0)},
            r"two matrices, .* for conv_in; got 'lora_unet_conv_in\.alpha",
        ),
        ({"conv_in.hada_w1_a": torch.ones(2, 2)}, "expected what a LoRA has for a layer, .*; got 'conv_in.hada_w1_a'"),
        ({"conv_in.lokr_w1": torch.ones(2, 2)}, "expected what a LoRA has for a layer, .*; got 'conv_in.lokr_w1'"),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, "what a LoRA has .*; got 'lora_unet_conv_in.hada_w1_a'"),
        ({"lora_unet_conv_in.lora_mid.weight": torch.ones(2, 2)}, "what a LoRA has .*; got .*lora_mid.weight'"),
        (
            KOHYA_CONV_IN | {"lora_unet_conv_in.alpha": torch.ones(2)},
            r"one finite number for 'lora_unet_conv_in\.alpha'; got the shape \(2,\)",
        ),
        (
            KOHYA_CONV_IN | {"lora_unet_conv_in.alpha": torch.tensor(torch.inf)},
            r"one finite number for 'lora_unet_conv_in\.alpha'; got inf",
        ),
        (
            halves("lora_unet_conv_in", down=(4,), names=("lora_down", "lora_up"))
            | {"lora_unet_conv_in.alpha": torch.tensor(1.0)},
            "two dimensions or more for 'lora_unet_conv_in.lora_down.weight'",
        ),
        (
            halves("lora_unet_conv_in", down=(0, 4, 3, 3), up=(8, 0), names=("lora_down", "lora_up"))
            | {"lora_unet_conv_in.alpha": torch.tensor(1.0)},
            "conv_in .*of one rank.*; got 0 and 0",
        ),
    ],
)
def test_what_is_no_lora(state, message):
    with pytest.raises(ValueError, match=message):
        fit_lora(state, shared())
