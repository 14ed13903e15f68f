"""Models by name, from folders, and what is refused."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel

from fastsd import CheckpointError, models
from tests.combinations import each_value
from tests.fixtures import one_thread  # noqa: F401

PARAMETERS = {
    "sd15": 859_520_964,
    "sd21": 865_910_724,
    "sdxl": 2_567_463_684,
    "ssd1b": 1_331_334_404,
    "vega": 745_225_604,
    "bk-base": 579_384_964,
    "bk-small": 482_346_884,
    "bk-tiny": 323_384_964,
    "bk-v2-base": 583_480_964,
    "bk-v2-small": 485_787_524,
    "bk-v2-tiny": 326_825_604,
    "inpaint": 859_535_364,
    "ip2p": 859_532_484,
    "lcm": 859_602_884,
    "tiny": 13_604,
    "controlnet-sd15": 361_279_120,
    "vae-sd": 83_653_863,
    "text-sd15": 123_060_480,
}

SMALL_UNET = models.MODELS["tiny"].config
SMALL_VAE = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "sample_size": 32,
}
SMALL_UNCONDITIONAL = {
    "sample_size": 8,
    "block_out_channels": [4, 8],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
}


def of(cls, config, **more):
    return lambda: cls(**config, **more)


TEXT_TIME = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
SMALL_CONTROLNET = {
    **{
        key: SMALL_UNET[key]
        for key in ("block_out_channels", "norm_num_groups", "cross_attention_dim", "down_block_types")
    },
    **{"attention_head_dim": 2, "layers_per_block": 1, "conditioning_embedding_out_channels": (4, 8, 8, 8)},
}
# one of each kind that is served, with every extra input that its kind can ask for
SMALL = {
    "unet": of(UNet2DConditionModel, SMALL_UNET),
    "sdxl": of(UNet2DConditionModel, SMALL_UNET, **TEXT_TIME, projection_class_embeddings_input_dim=32),
    "lcm": of(UNet2DConditionModel, SMALL_UNET, time_cond_proj_dim=6),
    "classes": of(UNet2DConditionModel, SMALL_UNET, num_class_embeds=3),
    "projected classes": of(
        UNet2DConditionModel, SMALL_UNET, class_embed_type="projection", projection_class_embeddings_input_dim=5
    ),
    "unconditional": of(UNet2DModel, SMALL_UNCONDITIONAL),
    "unconditional classes": of(UNet2DModel, SMALL_UNCONDITIONAL, num_class_embeds=3),
    "vae": of(AutoencoderKL, SMALL_VAE),
    "controlnet": of(ControlNetModel, SMALL_CONTROLNET),
}


@pytest.mark.parametrize("name", models.MODELS)
def test_named_model_has_its_size_and_can_be_called(name):
    model = models.load(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    with torch.no_grad():
        output = models.entry_point(model)(**models.example_inputs(model))
    side = models.default_latent(model)
    expected = {
        "controlnet-sd15": (1, 320, side, side),
        "vae-sd": (1, 3, 8 * side, 8 * side),
        "text-sd15": (1, 77, 768),
    }
    first = output[0][0] if name == "controlnet-sd15" else output[0]
    assert tuple(first.shape) == expected.get(name, (1, 4, side, side))


@each_value("name,dtype", list(SMALL), [torch.float32, torch.bfloat16])
def test_example_inputs_fit(name, dtype, tmp_path):
    SMALL[name]().save_pretrained(tmp_path)
    model = models.load(str(tmp_path), dtype)
    assert model.dtype == dtype
    assert not model.training
    with torch.no_grad():
        output = models.entry_point(model)(**models.example_inputs(model, batch=2, latent=8))
    values = models.flat_output(output)
    assert values.dtype == torch.float64
    assert values.isfinite().all()


def test_weights_are_the_same_on_every_call_and_draw_from_no_global_generator():
    torch.manual_seed(7)
    first = models.load("tiny")
    after_load = torch.rand(())
    torch.manual_seed(7)
    assert torch.rand(()) == after_load
    second = models.load("tiny")
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])


def test_weights_of_a_controlnet_are_not_zero(monkeypatch):
    monkeypatch.setitem(models.MODELS, "small", models.NamedModel("ControlNetModel", SMALL_CONTROLNET))
    model = models.load("small")
    assert all(module.weight.any() for module in model.modules() if isinstance(module, torch.nn.Conv2d))


def test_structure_without_weights():
    model = models.load("tiny", torch.float16, weights=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_pipeline_folder(tmp_path):
    DDPMPipeline(UNet2DModel(**SMALL_UNCONDITIONAL), DDPMScheduler()).save_pretrained(tmp_path)
    pipe = models.load(str(tmp_path), torch.bfloat16)
    assert isinstance(pipe, DDPMPipeline)
    unet = models.denoiser(pipe)
    assert unet is pipe.unet
    assert unet.dtype == torch.bfloat16


def test_pipeline_without_a_unet():
    class TransformerPipeline:
        components = {"transformer": torch.nn.Linear(1, 1)}  # noqa: RUF012

    with pytest.raises(models.UnknownModel, match="TransformerPipeline has no U-Net"):
        models.denoiser(TransformerPipeline())


def test_float32_copy_shares_nothing():
    half = models.load("tiny", torch.bfloat16)
    exact = models.float32_copy(half)
    assert {parameter.dtype for parameter in exact.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["sd99", "", "../nowhere", "a/b/c", "/nowhere/model", "owner/../name"])
def test_unknown_name(name):
    with pytest.raises(models.UnknownModel) as caught:
        models.load(name)
    assert repr(name) in str(caught.value)
    assert "sd15" in str(caught.value)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(models.UnknownModel, match=r"model_index\.json"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("name", ["UNet3DConditionModel", "os.system", None, ["UNet2DModel"]])
def test_folder_of_a_class_that_is_not_served(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(models.UnknownModel, match="UNet2DConditionModel"):
        models.load(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path):
    models.load("tiny").save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(CheckpointError, match=r"expected .*safetensors.*; there is diffusion_pytorch_model\.bin"):
        models.load(str(tmp_path))


def test_hub_id_is_asked_for_safetensors_only(monkeypatch):
    import diffusers

    asked = []
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda source: {})
    monkeypatch.setattr(
        diffusers.DiffusionPipeline,
        "from_pretrained",
        lambda source, **options: asked.append((source, options)) or torch.nn.Identity(),
    )
    models.load("owner/some-model.v1")
    ((source, options),) = asked
    assert source == "owner/some-model.v1"
    assert options["use_safetensors"] is True
