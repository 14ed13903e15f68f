"""The two halves of diffusers' AutoencoderKL."""

from typing import Any

from fastsd.patching.rule import Rule


def _reject(module: Any) -> str | None:
    from fastsd.nn.autoencoder import why_stock

    return why_stock(module)


def _op_calls(module: Any) -> dict[str, tuple[Any, ...]]:
    from fastsd.nn.autoencoder import example_calls

    return example_calls(module)


VAE_ENCODER = Rule(
    name="vae_encoder",
    target="diffusers.models.autoencoders.vae.Encoder",
    replacement="fastsd.nn.autoencoder.Encoder",
    reject=_reject,
    op_calls=_op_calls,
    passes_on=("down_blocks", "mid_block"),
)
VAE_DECODER = Rule(
    name="vae_decoder",
    target="diffusers.models.autoencoders.vae.Decoder",
    replacement="fastsd.nn.autoencoder.Decoder",
    reject=_reject,
    op_calls=_op_calls,
    passes_on=("mid_block", "up_blocks"),
)
