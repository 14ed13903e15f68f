"""Everything at once, as users load it: LoRA, IP-Adapter and ControlNet of the full model in one pipeline."""

import diffusers
import pytest
import torch

import fastsd
from fastsd.adapters import fit_controlnet, fit_ip_adapter, fit_lora
from tests.adapters.models import pruned, relative_error
from tests.adapters.test_controlnet import controlnet_of
from tests.adapters.test_lora import SOME, lora_of
from tests.combinations import long
from tests.compress.models import shared
from tests.patching.gri import ip_adapter


def pipeline_of(unet, controlnet):
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    nothing = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    pipe = diffusers.StableDiffusionControlNetPipeline(
        unet=unet,
        controlnet=controlnet,
        vae=vae,
        scheduler=diffusers.DDIMScheduler(),
        requires_safety_checker=False,
        image_encoder=None,
        **nothing,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **options):
    generator = torch.Generator().manual_seed(2)
    result = pipe(
        image=torch.rand(1, 3, 32, 32, generator=generator),
        prompt_embeds=torch.randn(1, 7, 8, generator=generator),
        negative_prompt_embeds=torch.zeros(1, 7, 8),
        num_inference_steps=2,
        generator=generator,
        output_type="latent",
        **options,
    )
    return result.images


@pytest.mark.parametrize("name", ["bk-sdm-tiny", *long("bk-sdm-small")])
def test_all_of_them(name, tmp_path):
    full = shared()
    torch.manual_seed(7)
    lora = {f"unet.{key}": value for key, value in lora_of("", SOME).items()}
    image = ip_adapter(full)
    pruned(name).save_pretrained(tmp_path)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    controlnet, _ = fit_controlnet(controlnet_of(full), unet)
    pipe = pipeline_of(unet, controlnet)
    results = [draw(pipe), draw(pipe, guess_mode=True), draw(pipe, controlnet_conditioning_scale=0.5)]
    pipe.load_lora_weights(fit_lora(lora, unet)[0])
    results.append(draw(pipe))
    fitted, _ = fit_ip_adapter(image, unet)
    pipe.load_ip_adapter(fitted, subfolder="", weight_name="", image_encoder_folder=None)
    embeds = [torch.cat([torch.zeros(1, 1, 6), torch.randn(1, 1, 6)])]
    results.append(draw(pipe, ip_adapter_image_embeds=embeds))
    for index, result in enumerate(results):
        assert result.isfinite().all()
        assert all(relative_error(result, other) > 1e-4 for other in results[:index])
    fastsd.patch(pipe)
    patched = draw(pipe, ip_adapter_image_embeds=embeds)
    assert relative_error(patched, results[-1]) < 1e-3
    fastsd.unpatch(pipe)
    assert torch.equal(draw(pipe, ip_adapter_image_embeds=embeds), results[-1])
