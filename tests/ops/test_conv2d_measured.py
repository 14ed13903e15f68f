"""Which implementation of conv2d a CUDA device takes: the file that says it, and who listens."""

import json

import pytest
import torch

from fastsd_kernels.conv2d import measured, op
from fastsd_kernels.conv2d.measured import IMPLEMENTATIONS, Shape
from fastsd_kernels.resnet_block import op as block_op

SHAPE = Shape(kernel=3, stride=2, channels=8, out_channels=16, height=5, width=4)
ROW = {**SHAPE._asdict(), "fastest": "triton 64x64"}


def call(x_device="meta", dtype=torch.float16, size=(9, 8), upsample_size=None):
    like = {"device": x_device, "dtype": dtype}
    x = torch.empty(2, 8, *size, **like).to(memory_format=torch.channels_last)
    return x, torch.empty(16, 8, 3, 3, **like), 2, (1, 1, 1, 1), upsample_size


class OnCuda:
    """A tensor that says that it is on a card."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.device = torch.device("cuda", 0)

    def __getattr__(self, name):
        return getattr(self.tensor, name)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A file of the user's own, for cards of capability 9.0, on a machine that has one."""
    path = tmp_path / "choices.json"
    path.write_text(json.dumps({"cuda:9.0": [ROW]}))
    monkeypatch.setenv(measured.ENVIRONMENT_VARIABLE, str(path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    measured._table_of.cache_clear()
    yield path
    measured._table_of.cache_clear()


def on_cuda(call):
    x, *rest = call
    return OnCuda(x), *rest


def test_a_measured_convolution(table, monkeypatch):
    assert measured.fastest(*on_cuda(call())) == "triton 64x64"
    assert measured.fastest(*on_cuda(call(dtype=torch.bfloat16))) == "triton 64x64"
    assert measured.fastest(*on_cuda(call(size=(5, 4), upsample_size=(9, 8)))) == "triton 64x64"
    assert measured.fastest(*on_cuda(call(size=(9, 9)))) is None
    assert measured.fastest(*on_cuda(call(dtype=torch.float32))) is None
    assert measured.fastest(*call()) is None  # on no card
    x, *rest = call()
    assert measured.fastest(OnCuda(x.contiguous()), *rest) is None
    measured._table_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert measured.fastest(*on_cuda(call())) is None


def test_the_user_s_own_file_goes_first_and_is_read_once(table, tmp_path, monkeypatch):
    other = {**ROW, "height": 6}
    package = tmp_path / "package.json"
    package.write_text(json.dumps({"cuda:9.0": [ROW | {"fastest": "direct"}, other | {"fastest": "implicit_gemm"}]}))
    monkeypatch.setattr(measured, "PACKAGE_FILE", package)
    assert measured.fastest(*on_cuda(call())) == "triton 64x64"
    assert measured.fastest(*on_cuda(call(size=(11, 8)))) == "implicit_gemm"
    table.unlink()
    assert measured.fastest(*on_cuda(call())) == "triton 64x64"


def test_the_user_s_own_file_is_missing(table, monkeypatch):
    table.unlink()
    with pytest.raises(ValueError, match=f"FASTSD_MEASURED: .*{table.name}"):
        measured.fastest(*on_cuda(call()))


def test_the_package_has_measured_nothing_yet():
    assert measured.read(measured.PACKAGE_FILE) == {}


def test_files_survive_a_round_trip(tmp_path):
    tables = {"cuda:9.0": {SHAPE: "direct", SHAPE._replace(stride=1): "implicit_gemm"}, "cuda:8.0": {}}
    path = tmp_path / "choices.json"
    path.write_text(json.dumps(measured.as_json(tables)))
    assert measured.read(path) == tables


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "JSONDecodeError"),
        ("[]", "AttributeError"),
        ("{", "JSONDecodeError"),
        ('{"cuda:9.0": 3}', "TypeError"),
        ('{"cuda:\u0669.0": []}', "expected a device like"),
        (json.dumps({"cuda:9.0": [ROW, ROW]}), "expected each convolution once"),
        ('{"cuda": []}', "expected a device like 'cuda:9.0'; got 'cuda'"),
        (json.dumps({"cuda:9.0": [ROW | {"height": -5}]}), "height: expected an integer from 1 to 1048576; got -5"),
        (json.dumps({"cuda:9.0": [ROW | {"width": 4.0}]}), "width: expected an integer"),
        (json.dumps({"cuda:9.0": [ROW | {"width": True}]}), "width: expected an integer"),
        (json.dumps({"cuda:9.0": [ROW | {"fastest": "triton 63x64"}]}), "got 'triton 63x64'"),
        (json.dumps({"cuda:9.0": [ROW | {"fastest": ["direct"]}]}), "fastest: expected one of direct"),
        (json.dumps({"cuda:9.0": [{"kernel": 3}]}), "KeyError: 'stride'"),
        pytest.param("[" * 100_000, "RecursionError", id="deep"),
    ],
    ids=str,
)
def test_a_file_that_is_none(tmp_path, text, says):
    path = tmp_path / "choices.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected a file of `python -m bench tune --into`") as caught:
        measured.read(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_forced(name):
    with measured.forced(name):
        assert measured.fastest(*call()) == name
        assert measured.fastest(*call(dtype=torch.float32)) is None
    assert measured.fastest(*call()) is None
    assert (measured.tile(name) is None) == (not name.startswith("triton "))


def test_the_backend_that_is_asked_first(monkeypatch):
    x, weight = torch.empty(2, 8, 9, 8).half(), torch.empty(16, 8, 3, 3).half()
    shortcut = torch.empty(16, 8, 1, 1).half()
    conv = (x, weight, None, 2, [1] * 4, None, 0, None, None, 1e-5, None, None, "none", None, None, None, 1.0, None)
    block = (x, weight, torch.empty(16, 16, 3, 3).half(), *[None] * 11, shortcut, None, 1.0)
    for name, preferred in (("triton 64x64", "triton"), ("direct", "cuda"), ("implicit_gemm", "cuda")):
        with measured.forced(name):
            assert op.prefer(*conv) == preferred
            assert block_op.prefer(*block) == preferred
            assert op.prefer(*conv[:-1], "direct") is None  # the algorithm decides
    assert op.prefer(*conv) is None
    assert block_op.prefer(*block) is None
    fastest = {weight.shape: "direct", shortcut.shape: "triton 64x64"}
    with monkeypatch.context() as patch:
        patch.setattr(measured, "fastest", lambda x, weight, *rest: fastest.get(weight.shape, "direct"))
        assert block_op.prefer(*block) is None


def test_the_backend_that_runs(monkeypatch):
    x, weight = torch.empty(2, 8, 9, 8).half(), torch.empty(16, 8, 3, 3).half()
    given = (OnCuda(x), weight, None, 2, [1] * 4, None, 0, None, None, 1e-5, None, None, "none", None, None, None, 1.0)
    backends = [op.backends[name] for name in ("cuda", "triton", "reference")]
    monkeypatch.setattr(op, "order", lambda device: [backend.name for backend in backends])
    monkeypatch.setattr(op, "_available", lambda device: tuple(backends))
    for backend in backends:
        monkeypatch.setattr(backend.module, "unavailable", lambda: None)
        monkeypatch.setattr(backend.module, "reject", lambda *args: None)
    for fastest, first in ((None, "cuda"), ("direct", "cuda"), ("triton 64x64", "triton")):
        monkeypatch.setattr(measured, "fastest", lambda *args, fastest=fastest: fastest)
        assert op.choose(*given, None).name == first
        assert next(op.explain(*given, None))[0] == first
        assert op.choose(*given, None, backend="reference").name == "reference"
    monkeypatch.setattr(backends[1].module, "reject", lambda *args: "not these")
    assert op.choose(*given, None).name == "cuda"
