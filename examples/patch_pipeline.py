"""Patch a Stable Diffusion pipeline, and see that it makes the same image: ``python -m examples.patch_pipeline``."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

import fastsd
from fastsd import models


def small_pipeline() -> Any:
    """Random weights and no text encoder, so that nothing is downloaded; your own comes from ``from_pretrained``."""
    vae = AutoencoderKL(
        block_out_channels=[4, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    unused = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe: Any = StableDiffusionPipeline(
        vae=vae, unet=models.load("tiny"), scheduler=scheduler, requires_safety_checker=False, **unused
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any) -> torch.Tensor:
    """One small image, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    prompt, negative = torch.randn(2, 1, 77, 8, generator=generator)
    return pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        num_inference_steps=4,
        generator=generator,
        output_type="pt",
    ).images


def main() -> None:
    pipe = small_pipeline()
    stock = image(pipe)

    fastsd.patch(pipe)
    fast = image(pipe)
    print(fastsd.report(pipe))

    fastsd.unpatch(pipe)
    print(f"largest difference of a pixel in 0 … 1: {(fast - stock).abs().max():.1e}")
    print(f"after unpatch the image is bitwise the first one: {torch.equal(image(pipe), stock)}")


if __name__ == "__main__":
    main()
