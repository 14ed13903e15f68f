"""T2I-Adapters of the full model: they have one map for each level, and a pruned U-Net has most of these levels."""

import diffusers
import pytest
import torch

import fastsd
from fastsd.adapters import fit_t2i_adapter
from tests.adapters.models import WHEN, patched_around, pruned, relative_error
from tests.combinations import each_value, long
from tests.compress.models import PLANS, SMALL_SD, SMALL_XL, build, call

IMAGE = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(4))


def adapter_of(kind="full_adapter"):
    """A random adapter for the full model."""
    torch.manual_seed(3)
    channels = SMALL_XL["block_out_channels"] if kind == "full_adapter_xl" else SMALL_SD["block_out_channels"]
    channels = [*channels, channels[-1]][:4]
    scale = 16 if kind == "full_adapter_xl" else 8
    adapter = diffusers.T2IAdapter(channels=channels, num_res_blocks=1, downscale_factor=scale, adapter_type=kind)
    return adapter.eval().requires_grad_(False)


def features_of(kind="full_adapter"):
    """Its maps."""
    return adapter_of(kind)(IMAGE)


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


@pytest.mark.parametrize("name", ["bk-sdm-tiny", "a-sdm", *long("bk-sdm-base", "bk-sdm-small")])
def test_each_map_reaches_its_level(name):
    small = pruned(name)
    none = [torch.zeros_like(feature) for feature in features_of()]
    plain = levels(small, none)
    assert len(plain) == (3 if name == "bk-sdm-tiny" else 4)
    for level, before in enumerate(plain):
        # the U-Net writes its results into some of its maps
        given = [map.clone() for map in none]
        given[level] += 100
        after = levels(small, given)[level]
        torch.testing.assert_close(after - before, given[level].expand_as(before), rtol=0, atol=1e-2)


def test_what_has_no_level_is_not_used():
    small = pruned("bk-sdm-tiny")
    features = features_of()
    expected = call_with(small, features)
    assert torch.equal(call_with(small, features[:3]), expected)
    assert not torch.equal(call_with(small, features[:2]), expected)


@each_value("name,when", ["bk-sdm-tiny", "ssd-1b"], WHEN)
def test_with_patch(name, when):
    kind = "full_adapter_xl" if name == "ssd-1b" else "full_adapter"
    features = features_of(kind)
    small = pruned(name)
    expected = call_with(small, [feature.clone() for feature in features])
    assert relative_error(call(small), expected) > 1e-3
    patched_around(small, when, lambda small: None)
    assert relative_error(call_with(small, features), expected) < 1e-4


@pytest.mark.parametrize("name", ["bk-sdm-tiny", "vega", *long("bk-sdm-base", "bk-sdm-small", "a-sdm", "ssd-1b")])
def test_recipes_need_no_fit(name):
    kind = "full_adapter_xl" if name in ("ssd-1b", "vega") else "full_adapter"
    small = pruned(name)
    fitted, report = fit_t2i_adapter(adapter_of(kind), small)
    assert torch.equal(call_with(small, fitted(IMAGE)), call_with(small, features_of(kind)))
    assert len(report.used) == (3 if name == "bk-sdm-tiny" else 4)
    assert report.skipped == (("down_blocks.3",) if name == "bk-sdm-tiny" else ())
    assert ("mid_block" in report.used) == (kind == "full_adapter_xl")


@pytest.mark.parametrize(("kind", "config"), [("full_adapter", SMALL_SD), ("full_adapter_xl", SMALL_XL)])
def test_a_block_without_its_transformers(kind, config):
    """Diffusers would add the map behind the downsampler."""
    full = build(config)
    small = fastsd.compress(full, PLANS["all_transformers_of_a_block"])
    features = features_of(kind)
    with pytest.raises(RuntimeError, match="must match the size"):
        call_with(small, features)
    adapter = adapter_of(kind)
    fitted, report = fit_t2i_adapter(adapter, small)
    assert report.skipped == ("down_blocks.1",)
    assert len(report.used) == 3
    assert str(report) == (
        "T2I-Adapter: 3 of 4 places are used; this U-Net does not have the others, which are skipped: down_blocks.1"
    )
    expected = [*features]
    expected[1] = torch.zeros(2, 16, 4, 4)
    result = call_with(small, fitted(IMAGE))
    assert torch.equal(result, call_with(small, expected))
    assert relative_error(result, call(small)) > 1e-3
    # the given one stays as it is, and a fit is made anew
    assert not adapter._forward_hooks
    again, report = fit_t2i_adapter(fitted, full)
    assert all(map(torch.equal, again(IMAGE), features))
    assert not report.skipped


def test_the_deepest_block_without_its_transformers():
    """It has no downsampler, so diffusers adds the map where it was added before."""
    small = fastsd.compress(
        build(SMALL_XL), fastsd.Plan(removed=("down_blocks.2.attentions.0", "down_blocks.2.attentions.1"))
    )
    assert small.config.down_block_types[-1] == "DownBlock2D"
    fitted, report = fit_t2i_adapter(adapter_of("full_adapter_xl"), small)
    assert report.used == ("down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block")
    given = fitted(IMAGE)
    zeros = [torch.zeros_like(map) for map in given]
    found = levels(small, [*zeros[:2], given[2].clone(), zeros[3]])[2] - levels(small, zeros)[2]
    assert found.any()


@pytest.mark.parametrize("kinds", [1, 2])
def test_in_a_pipeline(kinds):
    small = pruned("all_transformers_of_a_block")
    given = adapter_of() if kinds == 1 else diffusers.MultiAdapter([adapter_of(), adapter_of()])
    adapter, report = fit_t2i_adapter(given, small)
    assert type(adapter) is type(given)
    assert report.skipped == ("down_blocks.1",)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    nothing = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    pipe = diffusers.StableDiffusionAdapterPipeline(
        unet=small,
        adapter=adapter,
        vae=vae,
        scheduler=diffusers.DDIMScheduler(),
        requires_safety_checker=False,
        **nothing,
    )
    pipe.set_progress_bar_config(disable=True)
    results = []
    for scale in (0.0, 1.0):
        result = pipe(
            image=IMAGE[:1] if kinds == 1 else [IMAGE[:1]] * 2,
            adapter_conditioning_scale=scale if kinds == 1 else [scale] * 2,
            prompt_embeds=torch.ones(1, 7, 8),
            negative_prompt_embeds=torch.zeros(1, 7, 8),
            num_images_per_prompt=2,
            num_inference_steps=2,
            height=128,
            width=128,
            generator=torch.Generator().manual_seed(2),
            output_type="latent",
        )
        results.append(result.images)
    assert results[0].shape == (2, 4, 16, 16)
    assert relative_error(results[1], results[0]) > 1e-3


def test_refusals():
    small = fastsd.compress(build(), "bk-sdm-base")
    with pytest.raises(TypeError, match="adapter: expected a diffusers T2IAdapter or MultiAdapter; got Linear"):
        fit_t2i_adapter(torch.nn.Linear(1, 1), small)
    with pytest.raises(ValueError, match=r"maps of \[8, 16, 32, 32\] channels, .*; got \[8, 16, 16, 16\]"):
        fit_t2i_adapter(adapter_of("full_adapter_xl"), small)
    with pytest.raises(ValueError, match="adapter: expected one that is not compiled; fit it first, then compile"):
        fit_t2i_adapter(torch.compile(adapter_of()), small)
