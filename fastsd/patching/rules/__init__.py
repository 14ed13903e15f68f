"""The rules that come with fastsd, one file per kind of module."""

from fastsd.patching.rules.attention import ATTENTION
from fastsd.patching.rules.autoencoder import VAE_DECODER, VAE_ENCODER
from fastsd.patching.rules.feed_forward import FEED_FORWARD
from fastsd.patching.rules.resampling import DOWNSAMPLE, UPSAMPLE
from fastsd.patching.rules.resnet_block import RESNET_BLOCK
from fastsd.patching.rules.skipped_resnet import SKIPPED_RESNET
from fastsd.patching.rules.text_encoder import CLIP_ATTENTION, CLIP_LAYER
from fastsd.patching.rules.transformer import TRANSFORMER
from fastsd.patching.rules.transformer_block import TRANSFORMER_BLOCK
from fastsd.patching.rules.up_block import CROSS_ATTENTION_UP_BLOCK, UP_BLOCK

BUILT_IN = (
    RESNET_BLOCK,
    SKIPPED_RESNET,
    DOWNSAMPLE,
    UPSAMPLE,
    UP_BLOCK,
    CROSS_ATTENTION_UP_BLOCK,
    TRANSFORMER,
    TRANSFORMER_BLOCK,
    ATTENTION,
    FEED_FORWARD,
    VAE_ENCODER,
    VAE_DECODER,
    CLIP_LAYER,
    CLIP_ATTENTION,
)
