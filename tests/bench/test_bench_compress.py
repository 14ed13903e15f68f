"""``python -m bench compress`` and ``bench op cond_conv2d``: what is measured against what, and what does not count."""

import json
import sys

import pytest
import torch

import fastsd
from bench import compress
from bench.__main__ import main
from bench.kernels import bench_cond_conv2d
from bench.op import arithmetic
from fastsd import models
from fastsd.compress.measure import measure, total
from fastsd.models import NamedModel
from fastsd.nn.replacement import settings_of
from fastsd_kernels.cond_conv2d import op
from fastsd_kernels.conv2d import cpu_impl
from fastsd_kernels.gri_attention import cpu_impl as cpu_attention
from tests.compress.models import SMALL_SD, shared

NAMES = "bk-sdm-tiny,a-sdm"


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    monkeypatch.setitem(models.MODELS, "small-sd", NamedModel("UNet2DConditionModel", SMALL_SD))
    vae = models.MODELS["vae-sd"] | {"block_out_channels": [4] * 4, "norm_num_groups": 2, "layers_per_block": 1}
    monkeypatch.setitem(models.MODELS, "vae-sd", vae)
    small_text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(compress, "TEXT_CONFIG", small_text)


def bench(*arguments):
    return main(["compress", "--model", "small-sd", "--latent", "24", "--device", "cpu", *arguments])


def test_result_file(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert bench("--recipes", NAMES, "--repeats", "1", "--json", str(path)) == 0
    result = json.loads(path.read_text())
    assert list(result["recipes"]) == NAMES.split(",")
    unet = models.load("small-sd")
    around = sum(part["median_s"] for part in result["pipeline"]["parts"].values())
    assert list(result["pipeline"]["parts"]) == ["vae", "text encoder"]
    full, eager = result["full"], result["eager"]
    for row in (*result["recipes"].values(), full, eager):
        assert row["saved"] == pytest.approx(1 - row["median_s"] / full["median_s"])
        assert row["speedup_eager"] == pytest.approx(eager["median_s"] / row["median_s"])
        assert row["pipeline_s"] == pytest.approx(25 * row["median_s"] + around)
        assert row["pipeline_saved"] == pytest.approx(1 - row["pipeline_s"] / full["pipeline_s"])
        assert row["relative_l2"] <= 1e-4
    for row, each in ((full, unet), (result["recipes"]["a-sdm"], fastsd.compress(unet, "a-sdm"))):
        cost = total(measure(each, latent=24))
        assert (row["params"], row["gmacs"]) == (cost.parameters, cost.all_macs / 1e9)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("bk-sdm-tiny", "a-sdm", "full", "eager", "vae", "text encoder"))


def test_all_take_turns(monkeypatch):
    seen = {}
    monkeypatch.setattr(compress.harness, "interleaved", lambda runs, *rest, **more: seen.update(runs) or {})
    unet = models.load("small-sd")
    unet.conv_in.weight.requires_grad_(False)
    before = {name: (value.data_ptr(), value.requires_grad) for name, value in unet.named_parameters()}
    comparison = compress.compare(unet, ["bk-sdm-tiny", "a-sdm"], 1, 24, 1)
    assert list(seen) == ["bk-sdm-tiny", "a-sdm", "full", "vae", "text encoder", "eager"]
    assert not comparison.refusals
    # nothing is patched twice: each is modules of its own, which read the weights of the one model
    unets = [seen[name].func for name in ("bk-sdm-tiny", "a-sdm", "full", "eager")]
    is_patched = [any(settings_of(module) for module in each.modules()) for each in unets]
    assert is_patched == [True, True, True, False]
    modules = [{id(module) for module in each.modules()} for each in (*unets, unet)]
    assert len(set.union(*modules)) == sum(map(len, modules))
    assert {name: (value.data_ptr(), value.requires_grad) for name, value in unet.named_parameters()} == before
    assert unets[2].conv_in.weight.data_ptr() == unet.conv_in.weight.data_ptr()


@pytest.mark.long
def test_gri_attention_is_held_against_its_reference(monkeypatch):
    right = cpu_attention.run
    monkeypatch.setattr(cpu_attention, "run", lambda *arguments: right(*arguments) * 2)
    comparison = compress.compare(shared(), ["a-sdm", "bk-sdm-base"], 1, 24, 1, with_pipeline=False)
    assert list(comparison.refusals) == ["a-sdm"]
    assert "a-sdm is outside the numerical contract" in comparison.refusals["a-sdm"]
    assert list(comparison.timings) == ["bk-sdm-base", "full", "eager"]


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    right = cpu_impl.run
    monkeypatch.setattr(cpu_impl, "run", lambda *arguments: right(*arguments) * 1.01)
    path = tmp_path / "result.json"
    assert bench("--recipes", "bk-sdm-base", "--repeats", "1", "--json", str(path), "--no-pipeline") == 1
    captured = capsys.readouterr()
    assert "bk-sdm-base is outside the numerical contract" in captured.err
    assert "full is outside the numerical contract" in captured.err
    result = json.loads(path.read_text())
    assert result["recipes"] == {}
    assert result["eager"]["saved"] is None


@pytest.mark.long
def test_half_precision_is_held_against_float32():
    unet = torch.nn.Module.to(models.load("small-sd"), torch.bfloat16)
    comparison = compress.compare(unet, ["bk-sdm-tiny"], 1, 24, 1, with_pipeline=False)
    assert not comparison.refusals
    assert 1e-4 < comparison.errors["bk-sdm-tiny"] < 0.1


def test_a_missing_text_encoder_is_said(monkeypatch, capsys):
    # diffusers itself imports transformers where that is installed, with the first model
    fastsd.patch(fastsd.compress(models.load("small-sd"), "bk-sdm-tiny"))
    models.load("vae-sd", device="meta")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert bench("--recipes", "bk-sdm-tiny", "--repeats", "1") == 0
    assert "without its text encoder: transformers cannot be imported" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--recipes", "bk-sdm-base,bk-sdm-huge"), ("bk-sdm-huge", "bk-sdm-tiny")),
        (("--recipes", "ssd-1b"), ("ssd-1b", "three levels")),
        (("--cudagraph",), ("--cudagraph", "CUDA device")),
    ],
)
def test_refused_requests(arguments, says, capsys):
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert all(words in captured.err for words in says)


@pytest.fixture
def small_case(monkeypatch):
    case = bench_cond_conv2d.Case(2, 16, 8, 3)
    monkeypatch.setattr(bench_cond_conv2d, "CASES", {"2x16x8x8 e3": case})
    return case


@pytest.mark.usefixtures("small_case", "known_ceilings")
def test_cond_conv2d_and_its_strategies(tmp_path, capsys):
    path = tmp_path / "op.json"
    assert main(["op", "cond_conv2d", "--device", "cpu", "--repeats", "1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    medians = {row["provider"]: row["median_s"] for row in result["rows"]}
    strategies = ("mix_first", "mix_in_loop", "concat")
    assert set(medians) == {"eager", "loop", "fastsd", *strategies, "plain"}
    (found,) = result["conclusions"]
    assert found["fastest"] == min(strategies, key=lambda name: medians[name])
    assert found["overhead"] == pytest.approx(medians["fastsd"] / medians["plain"] - 1)
    assert found["chosen_to_fastest"] == pytest.approx(medians["fastsd"] / medians[found["fastest"]])
    assert "overhead over a plain convolution" in capsys.readouterr().out


@pytest.mark.usefixtures("small_case", "known_ceilings")
def test_a_wrong_yardstick_is_not_timed(tmp_path, monkeypatch, capsys):
    right = bench_cond_conv2d.conv2d
    monkeypatch.setattr(bench_cond_conv2d, "conv2d", lambda *given, **more: right(*given, **more) * 1.01)
    path = tmp_path / "op.json"
    assert main(["op", "cond_conv2d", "--device", "cpu", "--repeats", "1", "--json", str(path)]) == 1
    assert "plain is outside the numerical contract" in capsys.readouterr().err
    result = json.loads(path.read_text())
    assert "plain" not in {row["provider"] for row in result["rows"]}
    assert result["conclusions"][0]["overhead"] is None


def test_cond_conv2d_counts_mixing_and_convolution(small_case):
    sample = bench_cond_conv2d.sample_of(small_case, "small", torch.device("cpu"), torch.float32)
    # kernels, biases and routing; then the map
    assert arithmetic(op, bench_cond_conv2d, sample) == 2 * 2 * (3 * (9 * 16 * 16 + 16 + 16) + 9 * 16 * 16 * 64)
    torch.testing.assert_close(bench_cond_conv2d.loop(**sample.kwargs), bench_cond_conv2d.eager(**sample.kwargs))
