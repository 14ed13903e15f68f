"""What the stages of a U-Net hold, compute and take: against computed tables, and against formulas."""

import time

import pytest
import torch

import fastsd
from fastsd import models
from fastsd.compress.measure import Cost, measure, stages, timed, total
from fastsd.compress.model import build as build_compressed
from fastsd.compress.recipes import recipe
from tests.combinations import long
from tests.compress.models import EVERYTHING, SMALLEST, build, config_of, shared


@pytest.fixture(scope="module")
def sd15():
    return models.load("sd15", device="meta")


# parameters; GMAC of convolutions and linear layers, and of attention's products, at a latent of 64 and 77 tokens
PUBLISHED = {
    "bk-sdm-base": (579_384_964, 223.7, 37.8),
    "bk-sdm-small": (482_346_884, 217.6, 37.8),
    "bk-sdm-tiny": (323_384_964, 205.0, 37.8),
}


def test_buffers_are_no_parameters():
    unet = build(SMALLEST)
    before = total(measure(unet))
    unet.conv_in.register_buffer("scale", torch.ones(10))
    after = total(measure(unet))
    assert after.parameters == before.parameters
    assert after.bytes == before.bytes + 40


@pytest.mark.parametrize("name", [None, "bk-sdm-tiny", *long("bk-sdm-base", "bk-sdm-small")])
def test_sizes_of_sd(name, sd15):
    unet = sd15 if name is None else build_compressed(config_of(sd15), recipe(name, config_of(sd15)))[0]
    parameters, macs, attention = PUBLISHED.get(name, (859_520_964, 338.6, 63.0))
    found = total(measure(unet))
    assert found.parameters == parameters
    assert found.bytes == 4 * parameters
    assert found.macs / 1e9 == pytest.approx(macs, rel=1e-3)
    assert found.attention_macs / 1e9 == pytest.approx(attention, rel=1e-3)
    assert found.all_macs == found.macs + found.attention_macs


def test_a_sdm_counts_gri_attention_and_mixing(sd15):
    config = config_of(sd15)
    found = total(measure(build_compressed(config, recipe("a-sdm", config))[0]))
    pruned = fastsd.Plan(recipe("a-sdm", config).removed)
    plain = total(measure(build_compressed(config, pruned)[0]))
    full = total(measure(sd15))
    assert 1 - plain.all_macs / full.all_macs == pytest.approx(0.145, abs=1e-3)
    assert 1 - found.all_macs / full.all_macs == pytest.approx(0.216, abs=1e-3)
    # five convolutions mix two kernels and two biases each, and ask how much of each
    channels = [320] * 4 + [640]
    assert found.macs - plain.macs == sum(2 * (9 * n * 320 + 320 + n) for n in channels)
    # what is left at the highest level: three layers of 8 heads, 40 wide, with 16² keys of a window and 16² cells
    saved = 3 * 2 * 4096 * (4096 - 256 - 256) * 320
    assert plain.attention_macs - found.attention_macs == saved


def test_stages_hold_every_parameter():
    unet = shared()
    found = measure(unet, latent=16, tokens=7)
    assert list(found) == [
        *("conv_in", "embeddings", "down_blocks.0", "down_blocks.1", "down_blocks.2", "down_blocks.3", "mid_block"),
        *("up_blocks.0", "up_blocks.1", "up_blocks.2", "up_blocks.3", "conv_out"),
    ]
    assert total(found).parameters == sum(parameter.numel() for parameter in unet.parameters())
    assert found["conv_in"] == Cost(9 * 4 * 8 + 8, 4 * (9 * 4 * 8 + 8), 9 * 4 * 8 * 256, 0)
    assert found["embeddings"].macs == 8 * 32 + 32 * 32
    assert "mid_block" not in stages(fastsd.compress(unet, "bk-sdm-small"))


def test_the_model_is_left_as_it_is_and_patching_changes_no_count():
    unet = fastsd.compress(build(SMALLEST), EVERYTHING)
    before = {name: (value.data_ptr(), value.device.type) for name, value in unet.state_dict().items()}
    classes = [type(module) for module in unet.modules()]
    found = measure(unet, batch=2, latent=24, tokens=7)
    assert {name: (value.data_ptr(), value.device.type) for name, value in unet.state_dict().items()} == before
    assert [type(module) for module in unet.modules()] == classes
    assert measure(fastsd.patch(unet), batch=2, latent=24, tokens=7) == found
    half = measure(torch.nn.Module.to(fastsd.unpatch(unet), torch.float16), batch=2, latent=24, tokens=7)
    assert 2 * total(half).bytes == total(found).bytes
    assert total(half).all_macs == total(found).all_macs


def test_twice_the_samples_compute_twice():
    unet = build(SMALLEST)
    once, twice = (total(measure(unet, batch=batch, latent=16, tokens=7)) for batch in (1, 2))
    assert twice.attention_macs == 2 * once.attention_macs
    assert twice.macs == 2 * once.macs


def test_times_of_stages():
    unet = fastsd.patch(fastsd.compress(build(), "bk-sdm-tiny"))
    slow = unet.up_blocks[0].register_forward_pre_hook(lambda *arguments: time.sleep(0.1))
    with timed(unet) as call:
        for _ in range(2):
            seconds = call(models.example_inputs(unet, 1, 16, tokens=7))
            whole = seconds.pop("total")
            assert set(seconds) == set(stages(unet))
            assert all(value > 0 for value in seconds.values())
            assert sum(seconds.values()) < whole  # each call counts from zero
    slow.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_a_slow_stage_is_seen():
    unet = build()
    with timed(unet) as call:
        unet.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *arguments: time.sleep(0.3))
        seconds = call(models.example_inputs(unet, 1, 16, tokens=7))
    assert 0.3 < seconds["up_blocks.0"] < seconds["total"]
