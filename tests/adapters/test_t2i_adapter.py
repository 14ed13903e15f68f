"""T2I-Adapters of the full model need no fit: they have one map for each level, and a pruned U-Net has these levels."""

import diffusers
import pytest
import torch

from tests.adapters.models import WHEN, full_of, patched_around, pruned, relative_error
from tests.compress.models import SMALL_SD, SMALL_XL, call

SD_NAMES = ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "a-sdm")


def features_of(name, kind="full_adapter"):
    """The maps of a random adapter for the full model of a recipe, and the options that the U-Net takes them by."""
    torch.manual_seed(3)
    channels = SMALL_XL["block_out_channels"] if kind == "full_adapter_xl" else SMALL_SD["block_out_channels"]
    channels = [*channels, channels[-1]][:4]
    scale = 16 if kind == "full_adapter_xl" else 8
    adapter = diffusers.T2IAdapter(channels=channels, num_res_blocks=1, downscale_factor=scale, adapter_type=kind)
    return list(adapter.eval().requires_grad_(False)(torch.randn(2, 3, 128, 128)))


def call_with(unet, features):
    # the U-Net takes them out of the list
    return call(unet, down_intrablock_additional_residuals=list(features))


def levels(unet, features):
    """What each level made in the end: what its downsampler takes, or the block hands on where it has none."""
    found, handles = [], []
    for block in unet.down_blocks:
        if block.downsamplers is not None:
            hook = block.downsamplers[0].register_forward_pre_hook(lambda module, args: found.append(args[0]) or None)
        else:
            # before the U-Net adds to it, for a block without transformers
            hook = block.register_forward_hook(lambda module, args, output: found.append(output[0]) or None)
        handles.append(hook)
    call_with(unet, features)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", SD_NAMES)
@torch.no_grad()
def test_each_map_reaches_its_level(name):
    small = pruned(name)
    none = [torch.zeros_like(feature) for feature in features_of(name)]
    plain = levels(small, none)
    assert len(plain) == (3 if name == "bk-sdm-tiny" else 4)
    for level, before in enumerate(plain):
        # the U-Net writes its results into some of its maps
        given = [map.clone() for map in none]
        given[level] += 100
        after = levels(small, given)[level]
        torch.testing.assert_close(after - before, given[level].expand_as(before), rtol=0, atol=1e-2)


@torch.no_grad()
def test_what_has_no_level_is_not_used():
    small = pruned("bk-sdm-tiny")
    features = features_of("bk-sdm-tiny")
    expected = call_with(small, features)
    assert torch.equal(call_with(small, features[:3]), expected)
    assert not torch.equal(call_with(small, features[:2]), expected)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", ["bk-sdm-small", "bk-sdm-tiny", "ssd-1b"])
@torch.no_grad()
def test_with_patch(name, when):
    kind = "full_adapter_xl" if name == "ssd-1b" else "full_adapter"
    features = features_of(name, kind)
    small = pruned(name, full_of(name))
    expected = call_with(small, [feature.clone() for feature in features])
    assert relative_error(call(small), expected) > 1e-3
    patched_around(small, when, lambda small: None)
    assert relative_error(call_with(small, features), expected) < 1e-4
