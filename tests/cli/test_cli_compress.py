"""``fastsd compress``: the folder, the summary, and what is refused."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

import fastsd
from fastsd import models
from fastsd.cli import compress, main
from fastsd.compress.measure import measure, total
from fastsd.models import NamedModel
from tests.combinations import long
from tests.compress.models import SMALL_SD, build, shared


@pytest.fixture(autouse=True)
def small_sd(monkeypatch):
    monkeypatch.setitem(models.MODELS, "small-sd", NamedModel("UNet2DConditionModel", SMALL_SD))


def run(*given):
    return main(["compress", *map(str, given), "--device", "cpu", "--latent", "16"])


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("recipe", ["a-sdm", *long("bk-sdm-small")])
def test_saved_and_summed_up(recipe, tmp_path, capsys):
    out, path = tmp_path / "new" / "out", tmp_path / "summary.json"
    assert run("small-sd", "--recipe", recipe, "--out", out, "--repeats", "1", "--json", path) == 0
    saved = fastsd.load(out)
    expected = fastsd.compress(models.load("small-sd"), recipe)
    assert type(saved) is type(expected)
    assert_same(weights(saved), weights(expected))
    if recipe == "bk-sdm-small":
        assert_same(weights(UNet2DConditionModel.from_pretrained(out)), weights(expected))

    result = json.loads(path.read_text())
    assert [result[key] for key in ("model", "recipe", "out", "batch", "latent", "dtype")] == [
        *("small-sd", recipe, str(out), 1, 16, "float32"),
    ]
    assert result["class"] == type(expected).__name__
    *rows, whole = result["stages"]
    assert whole["stage"] == "total"
    for side, unet in (("before", models.load("small-sd")), ("after", expected)):
        cost = total(measure(unet, latent=16))
        assert whole[side]["parameters"] == sum(p.numel() for p in unet.parameters()) == cost.parameters
        assert (whole[side]["macs"], whole[side]["attention_macs"]) == (cost.macs, cost.attention_macs)
        parts = [row[side] for row in rows if row[side] is not None]
        for key in ("parameters", "bytes", "macs", "attention_macs"):
            assert sum(part[key] for part in parts) == whole[side][key]
        assert 0 < sum(part["seconds"] for part in parts) < 2 * whole[side]["seconds"]
    gone = [row["stage"] for row in rows if row["after"] is None]
    assert gone == (["mid_block"] if recipe == "bk-sdm-small" else [])
    printed = capsys.readouterr()
    assert all(words in printed.out for words in ("mid_block", "up_blocks.3", "saved", "%", str(out)))
    line = next(line for line in printed.out.splitlines() if line.startswith("saved") and "%" in line)
    assert line.split()[1] == f"{1 - whole['after']['parameters'] / whole['before']['parameters']:.1%}"
    assert ("fastsd.load" in printed.out) == (recipe == "a-sdm")
    assert printed.err == ""  # no progress bar where there is no terminal


def test_dry_run_saves_and_times_nothing(tmp_path, monkeypatch, capsys):
    folder, path = tmp_path / "stock", tmp_path / "summary.json"
    shared().save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()  # no weights are read

    def nothing(*arguments):
        raise AssertionError("nothing was to be timed")

    monkeypatch.setattr(compress, "_time", nothing)
    monkeypatch.chdir(tmp_path)
    assert run(folder, "--recipe", "bk-sdm-tiny", "--dry-run", "--json", path) == 0
    assert sorted(tmp_path.iterdir()) == [folder, path]
    rows = {row["stage"]: row for row in json.loads(path.read_text())["stages"]}
    assert rows["total"]["after"]["seconds"] is None
    # the deepest level is gone: what was the second up-block is the first
    assert rows["up_blocks.0"]["after"] is None
    assert rows["up_blocks.1"]["compressed_stage"] == "up_blocks.0"
    assert "nothing was saved" in capsys.readouterr().out


def test_of_a_pipeline_the_unet_in_its_own_dtype(tmp_path, capsys):
    pipeline, out = tmp_path / "pipeline", tmp_path / "out"
    unet = build().to(torch.bfloat16)
    unet.save_pretrained(pipeline / "unet")
    (pipeline / "model_index.json").write_text("{}")
    assert run(pipeline, "--recipe", "bk-sdm-base", "--out", out, "--repeats", "0") == 0
    saved = fastsd.load(out)
    assert saved.dtype == torch.bfloat16
    assert_same(weights(saved), weights(fastsd.compress(unet, "bk-sdm-base")))
    assert run(pipeline, "--recipe", "bk-sdm-base", "--dry-run") == 0
    assert "medians" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("small-sd", "--recipe", "bk-sdm-small"), ("--out", "--dry-run")),
        (("small-sd", "--recipe", "bk-sdm-huge", "--dry-run"), ("bk-sdm-huge", "bk-sdm-small", "a-sdm")),
        (("tiny", "--recipe", "bk-sdm-small", "--dry-run"), ("four levels", "layers_per_block 1")),
        (("tiny", "--recipe", "bk-sdm-small", "--out", "OUT"), ("four levels", "layers_per_block 1")),
        (("vae-sd", "--recipe", "bk-sdm-small", "--dry-run"), ("U-Net", "AutoencoderKL")),
        (("sd99", "--recipe", "bk-sdm-small", "--dry-run"), ("sd99", "sd15")),
        (("sd99", "--recipe", "bk-sdm-small", "--out", "OUT"), ("sd99", "sd15")),
        (("/no/folder", "--recipe", "bk-sdm-small", "--dry-run"), ("/no/folder", "no folder")),
        (("FULL", "--recipe", "bk-sdm-small", "--dry-run"), ("expected", "config.json")),
        (("FULL", "--recipe", "bk-sdm-small", "--out", "OUT"), ("expected", "config.json")),
        (("small-sd", "--recipe", "bk-sdm-small", "--out", "FULL"), ("--out", "is there already")),
        (("COMPRESSED", "--recipe", "bk-sdm-small", "--out", "OUT"), ("compressed",)),
        (("COMPRESSED", "--recipe", "bk-sdm-small", "--dry-run"), ("compressed",)),
    ],
)
def test_refused_requests(given, says, tmp_path, capsys):
    places = {"OUT": tmp_path / "out", "FULL": tmp_path / "full", "COMPRESSED": tmp_path / "compressed"}
    places["FULL"].mkdir()
    (places["FULL"] / "mine").write_text("kept")
    if "COMPRESSED" in given:
        fastsd.compress(shared(), "a-sdm").save_pretrained(places["COMPRESSED"])
    assert run(*(places.get(word, word) for word in given)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastsd: ")
    assert captured.err.count("\n") == 1
    assert all(words in captured.err for words in says), captured.err
    assert not places["OUT"].exists()
    assert [file.name for file in places["FULL"].iterdir()] == ["mine"]
