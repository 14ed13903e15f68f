"""Where the modules of a pruned U-Net were in the full model."""

import copy

import diffusers
import pytest
import torch

import fastsd
from fastsd import models
from fastsd.adapters import Compression, origin_of
from fastsd.compress.recipes import recipe as recipe_of
from tests.adapters.models import full_of, pruned
from tests.combinations import long
from tests.compress.models import PLANS, SMALL_SD, build, config_of, shared

PUBLISHED = {
    "bk-base": ("sd15", "bk-sdm-base"),
    "bk-small": ("sd15", "bk-sdm-small"),
    "bk-tiny": ("sd15", "bk-sdm-tiny"),
    "bk-v2-base": ("sd21", "bk-sdm-base"),
    "bk-v2-small": ("sd21", "bk-sdm-small"),
    "bk-v2-tiny": ("sd21", "bk-sdm-tiny"),
    "ssd1b": ("sdxl", "ssd-1b"),
    "vega": ("sdxl", "vega"),
}


OFTEN = ("bk-small", "bk-v2-tiny", "ssd1b")


def places(unet, origin):
    return {path: origin.source_of(path) for path, _ in unet.named_modules()}


@pytest.mark.parametrize("name", [*OFTEN, *long(*(name for name in PUBLISHED if name not in OFTEN))])
def test_published_models_are_recognised(name):
    base, recipe = PUBLISHED[name]
    full = models.load(base, device="meta")
    published = models.load(name, device="meta")
    known = origin_of(published)
    assert {key: value.shape for key, value in known.full.state_dict().items()} == {
        key: value.shape for key, value in full.state_dict().items()
    }
    plan = recipe_of(recipe, config_of(full))
    assert places(published, known) == places(published, origin_of(published, Compression(config_of(full), plan)))
    assert any(old != new for new, old in places(published, known).items()) == name.startswith(("bk", "ssd1b"))


@pytest.mark.parametrize("base", ["sd15", "sd21", "sdxl", "inpaint", "lcm"])
def test_full_models_are_their_own(base):
    full = models.load(base, device="meta")
    known = origin_of(full)
    assert known.structures == ()
    assert known.config == config_of(full)


@pytest.mark.parametrize(
    "name", ["bk-sdm-tiny", "a-sdm", *long("bk-sdm-base", "bk-sdm-small", "ssd-1b", "bypassed", "level", "experts")]
)
def test_compressed_models_know_it(name):
    full = full_of(name)
    small = pruned(name)
    known = origin_of(small)
    assert known.config == config_of(full)
    # every weight is the one that stands where the origin says
    given = full.state_dict()
    added = ("routing", "offset")
    for key, value in small.state_dict().items():
        if not any(part in key for part in added):
            source = given[known.source_of(key)]
            first = value.reshape(-1, *source.shape[1:])[: len(source)]
            assert torch.equal(first, source), key
    assert places(copy.deepcopy(small), origin_of(copy.deepcopy(small))) == places(small, known)
    in_place = fastsd.compress(full, PLANS.get(name, name), in_place=True)
    assert places(in_place, origin_of(in_place)) == places(small, known)


@pytest.mark.parametrize("name", ["bk-sdm-small", "a-sdm", *long("bk-sdm-base", "bk-sdm-tiny", "ssd-1b")])
def test_saved_models_are_recognised(name, tmp_path):
    small = pruned(name)
    small.save_pretrained(tmp_path)
    loaded = fastsd.load(tmp_path)
    assert hasattr(loaded, "compression") == (name == "a-sdm")
    assert places(loaded, origin_of(loaded)) == places(small, origin_of(small))


def test_compressed_twice():
    full, small = shared(), pruned("bk-sdm-base")
    twice = fastsd.compress(small, fastsd.Plan())
    assert places(twice, origin_of(twice)) == places(small, origin_of(small))
    fewer = fastsd.compress(small, fastsd.Plan(removed=("mid_block",)))
    assert origin_of(fewer).source_of("up_blocks.0.resnets.1.conv1") == "up_blocks.0.resnets.2.conv1"
    assert origin_of(fewer).full.state_dict().keys() == full.state_dict().keys()


def test_which_blocks_went_is_remembered(tmp_path):
    full = shared()
    named = recipe_of("bk-sdm-base", config_of(full)).removed
    swaps = {"up_blocks.0.resnets.1": "up_blocks.0.resnets.0", "down_blocks.3.resnets.1": "down_blocks.3.resnets.0"}
    assert set(swaps) <= set(named)
    other = fastsd.Plan(tuple(swaps.get(path, path) for path in named))
    small = fastsd.compress(full, other)
    assert small.config.layers_per_block == fastsd.compress(full, "bk-sdm-base").config.layers_per_block
    assert origin_of(small).source_of("up_blocks.0.resnets.0.conv1") == "up_blocks.0.resnets.1.conv1"
    assert origin_of(pruned("bk-sdm-base")).source_of("up_blocks.0.resnets.0") == "up_blocks.0.resnets.0"

    small.save_pretrained(tmp_path / "stock")
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "stock")
    without_mid = fastsd.compress(loaded, fastsd.Plan(removed=("mid_block",)))
    mixing = fastsd.compress(loaded, fastsd.Plan(experts={"up_blocks.0.resnets.0.conv1": ()}))
    mixing.save_pretrained(tmp_path / "mixing")
    for model in (loaded, fastsd.load(tmp_path / "stock"), without_mid, mixing, fastsd.load(tmp_path / "mixing")):
        known = origin_of(copy.deepcopy(model))
        assert known.source_of("up_blocks.0.resnets.0.conv1") == "up_blocks.0.resnets.1.conv1"
        assert known.full.state_dict().keys() == full.state_dict().keys()


@pytest.mark.parametrize("entry", [5, {"plan": 5}, {"base_config": {"code": 1}, "plan": {}, "before": None}], ids=str)
def test_a_damaged_entry(entry):
    unet = build()
    unet.register_to_config(_fastsd_compression=entry)
    with pytest.raises(fastsd.PlanError, match=r"compression: expected an object|base_config: .*got code"):
        origin_of(unet)


def test_unknown_models():
    unet = build(SMALL_SD, layers_per_block=3)
    with pytest.raises(
        ValueError, match=r"unet: expected one that fastsd\.compress has made.*layers_per_block 3.*origin="
    ):
        origin_of(unet)
    assert origin_of(unet, Compression(config_of(unet), fastsd.Plan())).config == config_of(unet)
    with pytest.raises(ValueError, match=r"expected what the plan makes of its origin, .*layers_per_block 2.*got"):
        origin_of(unet, Compression(config_of(build()), fastsd.Plan()))
    with pytest.raises(TypeError, match="unet: expected a diffusers UNet2DConditionModel; got Linear"):
        origin_of(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"origin: expected a fastsd.adapters.Compression, or None; got Plan"):
        origin_of(unet, fastsd.Plan())
