"""``python -m bench blocks``: what is measured, and what does not count."""

import json

import pytest
import torch

from bench import blocks
from bench.__main__ import main
from fastsd_kernels.conv2d import cpu_impl
from tests.combinations import long


def bench(*arguments):
    return main(["blocks", "--device", "cpu", "--latent", "8", "--repeats", "1", *arguments])


def test_blocks_of_a_model():
    found = blocks.distinct("sd15", 1, 64)
    assert sum(found.values()) == 22 + 3 + 3
    by_name = {block.name: count for block, count in found.items()}
    assert by_name["ResnetBlock2D 1x320->320x64x64"] == 2
    assert by_name["ResnetBlock2D 1x1280->1280x8x8"] == 4
    assert by_name["Upsample2D 1x640->640x32x32"] == 1
    assert len(blocks.distinct("vae-sd", 1, 64)) < sum(blocks.distinct("vae-sd", 1, 64).values())


@pytest.mark.parametrize("model", ["vae-sd", "bk-tiny", *long("sdxl")])
def test_only_one_block_takes_memory(model):
    for block in blocks.distinct(model, 1, None):
        tensors = [value for value in block.arguments if isinstance(value, torch.Tensor)]
        assert all(tensor.is_meta for tensor in (*tensors, *block.module.parameters()))


@torch.no_grad()
def test_sizes_that_an_upsampling_is_asked_for():
    # a latent of 10 is halved to 5 and 3: the way back is no doubling
    named = {block.name: block for block in blocks.distinct("sd15", 1, 10)}
    holder, given = named["Upsample2D 1x1280->1280x3x3"].build(torch.device("cpu"))
    assert holder[0](*given).shape == (1, 1280, 5, 5)


@pytest.mark.usefixtures("known_ceilings")
@pytest.mark.long
def test_compiled_block_of_a_vae(capsys):
    assert bench("--model", "vae-sd", "--blocks", "ResnetBlock2D 1x512->512x8x8", "--compile") == 0
    assert "compile ms" in capsys.readouterr().out


def test_result_file(tmp_path, capsys):
    path = tmp_path / "blocks.json"
    assert bench("--blocks", "1x320->320", "--json", str(path)) == 0
    result = json.loads(path.read_text())
    assert list(result) == ["model", "device", "commit", "versions", "ceiling_flops_per_s", "rows"]
    resnet, downsample = result["rows"]
    assert (resnet["block"], resnet["count"]) == ("ResnetBlock2D 1x320->320x8x8", 2)
    assert downsample["block"] == "Downsample2D 1x320->320x8x8"
    # two convolutions and the projection of the time embedding
    assert resnet["gflop"] == pytest.approx((2 * 2 * 9 * 320 * 320 * 64 + 2 * 1280 * 320) / 1e9)
    assert list(resnet["timings"]) == ["eager", "eager channels_last", "fastsd"]
    better = min(resnet["timings"][name]["median_s"] for name in ("eager", "eager channels_last"))
    assert resnet["speedup"] == pytest.approx(better / resnet["timings"]["fastsd"]["median_s"])
    assert 0 < resnet["relative_l2"] < 1e-5
    assert "speed-up" in capsys.readouterr().out


@pytest.mark.usefixtures("known_ceilings")
def test_a_wrong_block_does_not_count(monkeypatch, capsys):
    right = cpu_impl.run
    monkeypatch.setattr(cpu_impl, "run", lambda *arguments: right(*arguments) * 1.01)
    assert bench("--blocks", "Upsample2D 1x640") == 1
    captured = capsys.readouterr()
    assert "Upsample2D 1x640->640x4x4: relative L2 error 1.0e-02" in captured.err
    assert "Upsample2D" not in captured.out


def test_no_such_block(capsys):
    assert bench("--blocks", "Transformer") == 2
    assert "none contains 'Transformer'" in capsys.readouterr().err
