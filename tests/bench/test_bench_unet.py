"""``python -m bench unet``: the result file, the numerical contract, and what it refuses."""

import json

import pytest
import torch

from bench import footprint, harness, providers, unet
from bench.__main__ import main
from bench.providers import PROVIDERS, prepare, prepare_in_place, twin
from fastsd import models
from fastsd_kernels.conv2d import reference
from fastsd_kernels.gri_attention import cpu_impl as cpu_attention
from tests.patching.models import build


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny")


def bench(*arguments):
    return main(["unet", "--model", "tiny", "--latent", "8", "--device", "cpu", "--repeats", "2", *arguments])


def test_result_file(tmp_path, capsys):
    path = tmp_path / "result.json"
    names = "eager,channels_last,fastsd,fastsd-channels_last"
    assert bench("--providers", names, "--batch", "2", "--json", str(path)) == 0
    result = json.loads(path.read_text())
    assert list(result) == [
        *("model", "device", "dtype", "batch", "latent"),
        *("commit", "versions", "providers", "speedup"),
    ]
    assert (result["model"], result["dtype"], result["batch"], result["latent"]) == ("tiny", "float32", 2, 8)
    assert result["versions"]["torch"] == torch.__version__
    assert list(result["providers"]) == names.split(",")
    for row in result["providers"].values():
        assert list(row) == ["median_s", "p20_s", "p80_s", "relative_l2"]
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert 0 <= row["relative_l2"] <= 1e-4
    medians = {name: row["median_s"] for name, row in result["providers"].items()}
    assert result["speedup"] == {
        name: pytest.approx(medians[name] / medians["fastsd"]) for name in medians if name != "fastsd"
    }
    printed = capsys.readouterr().out
    assert all(name in printed for name in medians)


@pytest.mark.long
def test_peak_memory(tmp_path, capsys):
    # what the parent holds is none of a provider's business
    ballast = torch.ones(200 << 20)
    path = tmp_path / "result.json"
    assert bench("--providers", "fastsd", "--peak-memory", "--json", str(path)) == 0
    for row in json.loads(path.read_text())["providers"].values():
        assert list(row) == ["median_s", "p20_s", "p80_s", "relative_l2", "peak_bytes", "first_call_s"]
        assert 100e6 < row["peak_bytes"] < ballast.nbytes
        assert row["first_call_s"] > 0
    printed = capsys.readouterr().out
    assert "peak GB" in printed
    assert "first call s" in printed


def test_a_footprint_that_fails_leaves_the_timings(monkeypatch, capsys):
    def broken(name, *arguments):
        if name == "fastsd":
            raise RuntimeError("out of\nmemory")
        return footprint.Footprint(123_000_000, 4.0)

    monkeypatch.setattr(footprint, "in_fresh_process", broken)
    assert bench("--peak-memory") == 1
    captured = capsys.readouterr()
    assert "fastsd has no peak of memory: out of memory" in captured.err
    assert "0.12" in captured.out  # eager's
    rows = [line.split() for line in captured.out.splitlines() if line.startswith("fastsd")]
    assert [row[-3:] for row in rows] == [["-", "-", "-"]]


def test_footprint_is_of_the_model_itself(monkeypatch):
    def copies(*arguments):
        raise AssertionError("a copy of the model is not what a user has")

    monkeypatch.setattr(providers, "twin", copies)
    load = models.load
    monkeypatch.setattr(models, "load", lambda *arguments: (torch.ones(200 << 20), load(*arguments))[1])
    cpu = torch.device("cpu")
    footprint.forget_peak(cpu)
    before = footprint.peak_bytes(cpu)  # of whatever this process has done
    found = footprint.measure("fastsd-channels_last", "tiny", 1, 8, torch.float32, cpu)
    assert 100e6 < found.peak_bytes < before + 4 * (100 << 20)  # what only loading took is not counted


@torch.no_grad()
def test_in_place_is_the_same_provider():
    model, own = models.load("tiny"), models.load("tiny")
    inputs = models.example_inputs(model, latent=8)
    for name in ("eager", "channels_last", "fastsd-channels_last"):
        expected = models.flat_output(prepare(name, model, inputs)())
        # rounding of stock's operations: an Intel Xeon has shown 1.01e-6, and 0.9e-6 between stock's two layouts
        assert harness.relative_l2(models.flat_output(prepare_in_place(name, own, inputs)()), expected) < 4e-6, name
    layouts = {p.is_contiguous(memory_format=torch.channels_last) for p in own.parameters() if p.dim() == 4}
    assert layouts == {True}
    assert [type(module) for module in own.modules()] != [type(module) for module in model.modules()]


def test_half_precision_is_held_against_float32(tiny):
    half = torch.nn.Module.to(models.load("tiny"), torch.bfloat16)
    comparison = unet.compare(half, ("eager", "fastsd"), batch=1, latent=8, repeats=1)
    assert not comparison.refusals
    assert 1e-4 < comparison.errors["eager"] < 0.1
    assert comparison.errors["fastsd"] <= 1.5 * comparison.errors["eager"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_approximation_is_held_against_its_own_reference(dtype, monkeypatch):
    model = torch.nn.Module.to(models.load("tiny"), dtype)
    comparison = unet.compare(model, ("eager", "fastsd", "fastsd+gri"), batch=1, latent=24, repeats=1)
    assert not comparison.refusals
    assert comparison.errors["fastsd+gri"] > 1e-3
    assert "fastsd+gri" in comparison.speedup()

    right = cpu_attention.run
    monkeypatch.setattr(cpu_attention, "run", lambda *arguments: right(*arguments) * 2)
    comparison = unet.compare(model, ("eager", "fastsd+gri"), batch=1, latent=24, repeats=1)
    assert "fastsd+gri is outside the numerical contract" in comparison.refusals["fastsd+gri"]


def test_result_outside_the_contract_is_not_timed(tmp_path, capsys, monkeypatch):
    right = reference.run
    monkeypatch.setenv("FASTSD_BACKEND", "reference")
    monkeypatch.setattr(reference, "run", lambda *arguments: right(*arguments) * 1.01)
    path = tmp_path / "result.json"
    assert bench("--json", str(path)) == 1
    captured = capsys.readouterr()
    assert "fastsd is outside the numerical contract" in captured.err
    assert "×" not in captured.out
    result = json.loads(path.read_text())
    assert list(result["providers"]) == ["eager"]
    assert result["speedup"] == {}


def test_a_provider_that_fails_leaves_the_others(capsys, monkeypatch, tiny):
    def broken(*arguments):
        raise RuntimeError("out of\norder")

    monkeypatch.setenv("FASTSD_BACKEND", "reference")
    monkeypatch.setattr(reference, "run", broken)
    comparison = unet.compare(tiny, ("eager", "fastsd"), batch=1, latent=8, repeats=1)
    assert comparison.refusals == {"fastsd": "fastsd failed: out of order"}
    assert list(comparison.timings) == ["eager"]


def test_every_round_is_kept(tiny):
    rounds = []
    names = ("eager", "fastsd")
    unet.compare(tiny, names, batch=1, latent=8, repeats=3, on_round=lambda c: rounds.append(c.providers()))
    assert [list(providers) for providers in rounds] == [list(names)] * 3


@pytest.mark.parametrize(
    ("dtype", "error", "refused"),
    [
        (torch.float32, 1e-4, False),
        (torch.float32, 1.1e-4, True),
        (torch.float32, float("inf"), True),
        (torch.float16, 1.5e-2, False),
        (torch.float16, 1.6e-2, True),
    ],
)
def test_contract(dtype, error, refused):
    sentence = unet.outside_contract("fastsd", error, stock_error=1e-2, dtype=dtype)
    assert (sentence is not None) == refused


def test_providers_share_weights_and_leave_the_model_as_it_is(tiny):
    before = {name: (p.data_ptr(), p.stride()) for name, p in tiny.named_parameters()}
    classes = [type(module) for module in tiny.modules()]
    inputs = models.example_inputs(tiny, latent=8)
    with torch.no_grad():
        for name, provider in PROVIDERS.items():
            if not provider.cuda_only and "compile" not in name and name != "openvino":
                prepare(name, tiny, inputs)()
    assert {name: (p.data_ptr(), p.stride()) for name, p in tiny.named_parameters()} == before
    assert [type(module) for module in tiny.modules()] == classes

    shared, own = twin(tiny), twin(tiny, channels_last=True)
    assert all(a is b for a, b in zip(shared.parameters(), tiny.parameters(), strict=True))
    for weight, original in zip(own.parameters(), tiny.parameters(), strict=True):
        assert torch.equal(weight, original)
        assert weight.is_contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight is original


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--providers", "eager,tensorrt"), ("tensorrt", "channels_last", "fastsd")),
        (("--providers", "eager,cudagraph"), ("cudagraph", "CUDA device")),
        (("--model", "sd99"), ("sd99", "sd15", "vae-sd")),
    ],
)
def test_refused_requests(arguments, says, capsys):
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert all(words in captured.err for words in says)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*is deprecated:DeprecationWarning")
@torch.no_grad()
@pytest.mark.long
def test_openvino():
    tiny = build("small")
    pytest.importorskip("openvino", reason="an extra: pip install .[bench]")
    inputs, classes = models.example_inputs(tiny, latent=8), [type(module) for module in tiny.modules()]
    expected = models.flat_output(prepare("eager", tiny, inputs)())
    call = prepare("openvino", tiny, inputs)
    assert 0 < harness.relative_l2(models.flat_output(call()), expected) < 1e-5
    assert [type(module) for module in tiny.modules()] == classes
    inputs["sample"] += 1.0  # not a constant of the trace
    assert harness.relative_l2(models.flat_output(call()), expected) > 1e-3


def test_providers_that_cannot_run(monkeypatch):
    with pytest.raises(ValueError, match="openvino runs on a CPU; leave it out on cuda"):
        providers.check_providers(["openvino"], torch.device("cuda"))
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="openvino needs a package that is not installed; pip install openvino"):
        providers.check_providers(["openvino"], torch.device("cpu"))
