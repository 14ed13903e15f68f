"""``python -m bench tune``: the convolutions of a model, the choice, and the file; on a card that is played."""

import json

import pytest
import torch

from bench import harness, tune
from bench.__main__ import main
from fastsd_kernels import conv2d
from fastsd_kernels.conv2d import measured
from fastsd_kernels.conv2d.measured import Shape
from fastsd_kernels.dispatch import BackendUnavailable

SMALL = Shape(3, 1, 32, 16, 6, 5)
STRIDED = Shape(3, 2, 8, 16, 3, 4)


def test_convolutions_of_a_model():
    shapes = tune.shapes_of("sd15")
    assert Shape(3, 1, 320, 320, 64, 64) in shapes
    assert Shape(3, 2, 320, 320, 32, 32) in shapes
    assert Shape(1, 1, 2560, 1280, 8, 8) in shapes
    assert Shape(3, 1, 4, 320, 64, 64) in shapes
    assert all(shape.kernel in (1, 3) for shape in shapes)


@pytest.mark.parametrize("shape", [SMALL, STRIDED, Shape(1, 1, 32, 16, 6, 5)], ids=str)
def test_a_sample_is_the_convolution(shape):
    kwargs = tune.sample_of(shape, 2, torch.device("cpu"), torch.float32).kwargs
    y = conv2d(**kwargs)
    assert y.shape == (2, shape.out_channels, shape.height, shape.width)
    assert ("num_groups" in kwargs) == (shape is SMALL)
    assert kwargs["weight"].shape == (shape.out_channels, shape.channels, shape.kernel, shape.kernel)


@pytest.mark.parametrize(
    ("seconds", "choice"),
    [
        ({"direct": 1.0, "triton 64x64": 0.99}, "direct"),
        ({"direct": 1.0, "triton 64x64": 0.9, "implicit_gemm": 0.8}, "implicit_gemm"),
        ({"triton 64x64": 2.0, "triton 64x32": 1.0}, None),
        ({}, None),
        ({"direct": 1.0}, "direct"),
    ],
    ids=str,
)
def test_choice(seconds, choice):
    assert tune.choice(seconds) == choice


def played(name, kwargs):
    """The implementations of a card: one is wrong, one refuses, and all others are the reference."""
    if name == "implicit_gemm":
        raise BackendUnavailable("no such card")
    y = conv2d(**kwargs, backend="reference")
    return y * 1.1 if name == "triton 128x128" else y


def test_what_is_wrong_or_refuses_is_not_timed(monkeypatch):
    monkeypatch.setattr(tune, "call", played)
    sample = tune.sample_of(SMALL, 2, torch.device("cpu"), torch.float16)
    seconds, left_out = tune.measure(sample, harness.host_clock(), 2)
    assert list(seconds) == [n for n in measured.IMPLEMENTATIONS if n not in ("implicit_gemm", "triton 128x128")]
    assert left_out.pop("implicit_gemm") == "no such card"
    assert left_out.pop("triton 128x128").startswith("error")
    assert not left_out


def test_a_convolution_that_is_too_large(monkeypatch):
    def full(**kwargs):
        raise torch.OutOfMemoryError("out of\nmemory")

    monkeypatch.setattr(tune, "conv2d", full)
    sample = tune.sample_of(SMALL, 2, torch.device("cpu"), torch.float16)
    assert tune.measure(sample, harness.host_clock(), 2) == (
        {},
        dict.fromkeys(measured.IMPLEMENTATIONS, "out of memory"),
    )


def test_the_file_is_added_to(tmp_path, monkeypatch, capsys):
    path, times = tmp_path / "choices.json", tmp_path / "times.json"
    other = {SMALL: "triton 64x16"}
    path.write_text(json.dumps(measured.as_json({"cuda:8.0": other, "cuda:9.0": {STRIDED: "direct", SMALL: "direct"}})))
    sample_of = tune.sample_of
    monkeypatch.setattr(tune, "shapes_of", lambda model: {SMALL})
    monkeypatch.setattr(tune, "sample_of", lambda shape, batch, device, dtype: sample_of(shape, batch, "cpu", dtype))
    monkeypatch.setattr(
        tune, "measure", lambda *args: ({"direct": 2e-6, "triton 64x32": 1e-6}, {"implicit_gemm": "no"})
    )
    monkeypatch.setattr(tune.environment, "device_name", lambda device: "a card")
    monkeypatch.setattr(tune.arguments, "device", torch.device)
    monkeypatch.setattr(tune.harness, "use", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert main(["tune", "--device", "cuda", "--into", str(path), "--json", str(times)]) == 0
    assert measured.read(path) == {"cuda:8.0": other, "cuda:9.0": {STRIDED: "direct", SMALL: "triton 64x32"}}
    (row,) = json.loads(times.read_text())["rows"]
    assert row["seconds"] == {"direct": 2e-6, "triton 64x32": 1e-6}
    assert row["left_out"] == {"implicit_gemm": "no"}
    captured = capsys.readouterr()
    assert "triton 64x32" in captured.out.splitlines()[-1]
    assert "implicit_gemm is left out of 3x1x32x16x6x5: no" in captured.err
    # without a time of cuDNN the choice stays what it was
    monkeypatch.setattr(tune, "measure", lambda *args: ({"triton 64x16": 1e-6}, {"direct": "no"}))
    assert main(["tune", "--device", "cuda", "--models", " sd15, ", "--into", str(path)]) == 0
    assert measured.read(path)["cuda:9.0"][SMALL] == "triton 64x32"


def test_a_machine_without_a_card(capsys):
    assert main(["tune", "--device", "cpu"]) == 2
    assert "expected a CUDA device" in capsys.readouterr().err


def test_a_model_that_is_not_known(monkeypatch):
    with pytest.raises((ValueError, OSError), match="sd99"):
        tune.shapes_of("sd99")
