"""Which implementation of conv2d is taken: by measurements on a CUDA device, by a model of costs on a CPU."""

import inspect
import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastsd_kernels import conv2d, cuda_runtime
from fastsd_kernels.conv2d import ALGORITHMS, composed, cpu_costs, cuda_impl, measured, op, triton_impl
from fastsd_kernels.conv2d.measured import IMPLEMENTATIONS, Shape
from fastsd_kernels.conv2d.triton_tiles import TILES
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.resnet_block import op as block_op
from fastsd_kernels.testing import Sample
from tests.contract import covering
from tests.runners import RUNNERS

WINOGRAD = ("winograd2", "winograd4")
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


def arguments(**kwargs: Any) -> list[Any]:
    """Those of the op, in the order of its schema, without backend."""
    bound = inspect.signature(conv2d).bind(**kwargs)
    bound.apply_defaults()
    if isinstance(bound.arguments["padding"], int):
        bound.arguments["padding"] = [bound.arguments["padding"]] * 4
    return list(bound.arguments.values())[:-1]


def test_measurements_decide(monkeypatch):
    sample = covering.samples(op, "cpu", torch.float16)["stride_2_channels_last"]
    monkeypatch.setattr(cuda_impl, "compute", lambda *args: "implicit_gemm")
    monkeypatch.setattr(cuda_impl.composed, "run", lambda *args: "direct")
    monkeypatch.setattr(cuda_runtime, "multiprocessors", lambda device: 132)
    for fastest in ("direct", "implicit_gemm", "triton 64x64"):
        with measured.forced(fastest):
            expected = "implicit_gemm" if fastest == "implicit_gemm" else "direct"
            assert cuda_impl.run(*arguments(**sample.kwargs)) == expected
            assert cuda_impl.run(*arguments(**sample.map_tensors(Tensor.float).kwargs)) == "direct"
            assert cuda_impl.run(*arguments(**sample.kwargs | {"algorithm": "direct"})) == "direct"


@pytest.mark.parametrize("name", TILES)
def test_measured_tile_is_taken(name):
    sample = covering.samples(op, "cpu", torch.float16)["everything_channels_last"]
    with measured.forced(f"triton {name}"):
        steps = [
            s for of in (sample, sample.map_tensors(Tensor.float)) for s in RUNNERS["interpreter"].launches(op, of)
        ]
    two_bytes, four_bytes = ((*s.args[-4:-1], s.num_warps) for s in steps if s.kernel.__name__ == "convolve")
    assert two_bytes == TILES[name]
    assert four_bytes == triton_impl.tile(30, 16, 4)


@pytest.mark.parametrize("algorithm", [None, "direct"])
def test_cuda_default_is_torchs_convolution(algorithm):
    given = covering.samples(op, "cpu", torch.float16)["everything_channels_last"].kwargs
    expected = composed.run(*arguments(**given)[:-1])
    actual = cuda_impl.run(*arguments(**given | {"algorithm": algorithm}))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def costs_of(channels: int, side: int, out_channels: int | None = None, kernel=3, stride=1, extra=0):
    return cpu_costs.Call(1, channels, out_channels or channels, side, side, kernel, stride, extra)


@pytest.mark.parametrize(
    ("of", "cheapest"),
    [
        (costs_of(320, 64), "winograd4"),
        (costs_of(640, 32), "winograd4"),
        (costs_of(1280, 16), "winograd4"),
        # transforming the weights pays even for a few tiles; torch's convolution reorders them, which takes longer
        (costs_of(320, 8), WINOGRAD),
        (costs_of(1280, 8), WINOGRAD),
        # F(4x4)'s rounding errors are larger, and a convolution as small as this takes next to no time
        (costs_of(64, 16), "winograd2"),
        # few channels
        (costs_of(4, 64, 320), "direct"),
        (costs_of(320, 64, 4), "direct"),
        # with few positions, or with passes around torch's convolution that columns do not need
        (costs_of(1280, 8, stride=2), "product"),
        (costs_of(1280, 8, kernel=1), "product"),
        (costs_of(128, 256, kernel=1), "direct"),
        (costs_of(128, 256, kernel=1, extra=3 * 4 * 128 * 256**2), "product"),
    ],
    ids=str,
)
def test_cheapest_algorithm(of, cheapest):
    assert cpu_costs.cheapest(of) in ([cheapest] if isinstance(cheapest, str) else cheapest)


def test_cheapest_of_those_that_are_left():
    assert cpu_costs.cost("winograd4", costs_of(64, 16)) < cpu_costs.cost("winograd2", costs_of(64, 16))
    for channels in (320, 1280):
        assert cpu_costs.cheapest(costs_of(channels, 8), but=WINOGRAD) == "product"


def test_only_plain_float32_is_transformed(monkeypatch):
    seen = []
    monkeypatch.setattr(cpu_costs, "cheapest", lambda *args: seen.append(args) or "winograd2")
    x, weight = torch.randn(1, 8, 8, 8), torch.randn(8, 8, 3, 3)
    conv2d(x.bfloat16(), weight.bfloat16(), padding=1)
    conv2d(x[:0], weight, padding=1)
    for setting in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv):
        before, setting.fp32_precision = setting.fp32_precision, "bf16"
        try:
            conv2d(x, weight, padding=1)
        finally:
            setting.fp32_precision = before
    assert not seen
    conv2d(x, weight, padding=1)
    assert len(seen) == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("backend", "served"),
    [("cpu", ("direct", "product", *WINOGRAD)), ("cuda", ("direct", "implicit_gemm")), ("triton", ("implicit_gemm",))],
)
def test_algorithms_of_backends(backend, served, algorithm):
    with FakeTensorMode():
        x, weight = (torch.empty(8, 8, 3, 3, device="cpu" if backend == "cpu" else "cuda").half() for _ in range(2))
        refusal = op.backends[backend].module.reject(*arguments(x=x, weight=weight, algorithm=algorithm))
    if algorithm in served:
        assert refusal is None
    else:
        assert repr(algorithm) in refusal
        assert all(name in refusal for name in served)


@pytest.mark.parametrize(
    ("backend", "changes", "says"),
    [
        ("cpu", {"stride": 2, "algorithm": "winograd4"}, "stride is 2; winograd4 takes stride 1, use algorithm='prod"),
        ("cpu", {"kernel": 1, "algorithm": "winograd2"}, "weight is (8, 8, 1, 1); winograd2 takes 3×3"),
        ("cuda", {"dtype": torch.float32}, "x is torch.float32; implicit_gemm takes float16 and bfloat16"),
        ("cuda", {"dtype": torch.float64}, "x is torch.float64; implicit_gemm takes float16 and bfloat16"),
        ("cuda", {"dtype": torch.float32, "algorithm": None}, None),
        ("cuda", {"dtype": torch.float64, "algorithm": "direct"}, None),
        ("cuda", {"dtype": torch.bfloat16}, None),
        ("cuda", {"batch": 0}, None),
        ("cuda", {"batch": 2**29}, "x has 536870912 samples"),
    ],
    ids=str,
)
def test_refusals(backend, changes, says):
    given: dict[str, Any] = {"batch": 2, "kernel": 3, "dtype": torch.float16, "algorithm": "implicit_gemm"} | changes
    like = {"device": "cuda" if backend == "cuda" else "cpu", "dtype": given.pop("dtype")}
    with FakeTensorMode():
        x, kernel = torch.empty(given.pop("batch"), 8, 4, 4, **like), given.pop("kernel")
        weight = torch.empty(8, 8, kernel, kernel, **like)
        refusal = op.backends[backend].module.reject(*arguments(x=x, weight=weight, padding=1, **given))
    assert refusal is None if says is None else refusal.startswith(says)


def test_interpreter_refuses_bfloat16():
    given = {"x": torch.ones(1, 8, 4, 4).bfloat16(), "weight": torch.ones(8, 8, 3, 3).bfloat16()}
    with pytest.raises(BackendUnavailable, match=r"bfloat16.*TRITON_INTERPRET"):
        RUNNERS["interpreter"].launches(op, Sample("bfloat16", given))
