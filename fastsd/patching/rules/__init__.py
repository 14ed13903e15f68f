"""The rules that come with fastsd, one file per kind of module."""

from fastsd.patching.rules.resampling import DOWNSAMPLE, UPSAMPLE
from fastsd.patching.rules.resnet_block import RESNET_BLOCK

BUILT_IN = (RESNET_BLOCK, DOWNSAMPLE, UPSAMPLE)
