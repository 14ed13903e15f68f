"""linear in Triton: interpreted on the CPU, compiled for cards that are not here, and run on one that is."""

import inspect
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastsd_kernels import linear
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.linear import cases, op
from fastsd_kernels.testing import Sample, check_op, named
from fastsd_kernels.testing.inputs import random_tensor
from tests.proving import interpreter

triton_impl = op.backends["triton"].module
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile; unset it", allow_module_level=True)
triton_aot = pytest.importorskip("tests.budgets.triton_aot", reason="Triton is not installed")

from tests.budgets.ops.linear import TRITON, triton_launches  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SAMPLES = [sample.name for sample in cases.samples("cpu", torch.float32)]

# With tiles this small a few hundred elements take the paths of large inputs: several tiles of rows, of features, of
# channels, and of the channels of the moments
SMALL_TILES = {"MOST_M": 16, "MOST_N": 16, "MOST_K": 16, "MOMENTS_K": 16}
SMALL_TILE_SAMPLES = (
    "everything_packed",
    "many_rows_none",
    "many_rows_geglu",
    "many_rows_bare",
    "wide_gelu",
    "wide_bare",
    "many_features_geglu",
    "many_features_none",
    "weight_transposed",
    "weight_sliced",
    "mixed_dtypes",
    "large_mean",
    "constant_rows",
    "nan_in_normed_x_geglu",
    "inf_in_x_none",
    "inf_in_weight",
)


def sample_launches(sample: Sample):
    """The launches of one call of the public function, its tensors on ``meta``."""
    given = sample.map_tensors(lambda tensor: tensor.to("meta")).kwargs
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(linear).parameters.items()
        if parameter.default is not inspect.Parameter.empty and name != "backend"
    }
    return triton_impl.launches(**defaults | given)[1]


def arguments(launch) -> dict[str, Any]:
    return dict(zip(launch.kernel.arg_names, launch.args, strict=True))


def sample_of(x: torch.Tensor, out: int, **given: Any) -> Sample:
    return Sample("sizes", {"x": x, "weight": x.new_empty(out, x.shape[-1])} | given)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_interpreted(dtype, name):
    failure = interpreter.failures("linear", dtype)[name]
    assert failure is None, failure


@pytest.mark.parametrize("name", SMALL_TILE_SAMPLES)
def test_interpreted_in_small_tiles(name):
    small = tuple(SMALL_TILES.items())
    results = interpreter.failures("linear", "float32", names=SMALL_TILE_SAMPLES, constants=small, twice=True)
    assert results[name] is None, results[name]


def test_small_tiles_take_the_paths_of_large_inputs(monkeypatch):
    for name, value in SMALL_TILES.items():
        monkeypatch.setattr(triton_impl, name, value)
    monkeypatch.setattr(triton_impl, "tile", triton_impl.tile.__wrapped__)

    moments, project = map(arguments, sample_launches(named(cases.samples("cpu", torch.float32), "many_rows_geglu")))
    assert (project["BLOCK_M"], project["BLOCK_N"], project["BLOCK_K"]) == (16, 16, 16)
    # more rows of tiles than run side by side, and the last ones are not full
    assert project["row_tiles"] > 2 * 8
    assert project["column_tiles"] == 2
    for size, block in (("rows", "BLOCK_M"), ("features", "BLOCK_N"), ("channels", "BLOCK_K")):
        assert project[size] % project[block] > 0
    assert moments["channels"] == 20 > moments["BLOCK_K"]
    assert moments["rows"] % moments["BLOCK_M"] > 0

    moments, project = map(arguments, sample_launches(named(cases.samples("cpu", torch.float32), "wide_gelu")))
    assert project["channels"] > 16 * project["BLOCK_K"]
    assert moments["channels"] > 16 * moments["BLOCK_K"]
    (project,) = map(arguments, sample_launches(named(cases.samples("cpu", torch.float32), "many_features_bare")))
    assert project["column_tiles"] > 16


def test_results_that_are_exact():
    """Infinities of gelu, and rows whose norm is infinite in 16 bits where there are no channels any more."""
    program = """
        import torch
        from fastsd_kernels import linear

        x = torch.tensor([[torch.inf], [-torch.inf], [torch.nan]])
        y = linear(x, torch.ones(1, 1), activation="gelu", backend="triton")
        expected = torch.nn.functional.gelu(x.double()).float()
        assert expected[0] == torch.inf
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)

        for channels in (5, 40, 600):
            x, weight = torch.full((3, channels), 1000.0).half(), torch.ones(7, channels).half()
            y = linear(x, weight, norm_eps=1e-8, backend="triton")
            assert (y == 0).all(), y
    """
    child = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(program)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr


def test_interpreter_refuses_bfloat16():
    failure = interpreter.failures("linear", "bfloat16", names=("plain_contiguous",))["plain_contiguous"]
    for words in ("BackendUnavailable", "bfloat16", "TRITON_INTERPRET"):
        assert words in failure


SIZES = tuple(
    itertools.product((1, 17, 64, 154, 512, 8192, 1 << 20), (1, 33, 320, 640, 1280, 5120), (False, True), (2, 4))
)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_are_such_as_tensor_cores_multiply(size):
    tile = triton_impl.tile(*size)
    for number in tile:
        assert number & (number - 1) == 0
    assert min(tile.block_m, tile.block_n, tile.block_k) >= 16
    assert 1 <= tile.num_warps <= 8
    # 32 KiB of sums at most, so that the registers hold them
    _, _, gated, _ = size
    assert tile.block_m * tile.block_n * (2 if gated else 1) <= 128 * 128


@pytest.mark.parametrize(
    ("rows", "features", "gated"),
    [
        *((8192, 320, False), (8192, 1280, True), (2048, 640, False), (2048, 2560, True)),
        *((512, 1280, False), (512, 5120, True), (128, 1280, False), (128, 5120, True)),
    ],
)
def test_stable_diffusion_occupies_most_multiprocessors(rows, features, gated):
    tile = triton_impl.tile(rows, features, gated, 2)
    assert -(-rows // tile.block_m) * -(-features // tile.block_n) >= 80
    assert features % tile.block_n == 0


def test_every_tile_has_a_gate():
    gated = {
        (launch.args[-4:-1], launch.num_warps, launch.args[-5] == "geglu", launch.args[0].element_size())
        for *variant, _ in TRITON
        for launch in triton_launches(*variant)
        if launch.kernel.__name__ == "project"
    }
    for rows, features, gates, itemsize in SIZES:
        *block, num_warps = triton_impl.tile(rows, features, gates, itemsize)
        assert (tuple(block), num_warps, gates, itemsize) in gated


def test_many_rows_stay_on_the_one_long_grid_axis():
    x = torch.empty(65_537 * 128, 4, device="meta", dtype=torch.float16)
    steps = sample_launches(sample_of(x, 6, activation="geglu", norm_eps=1e-5))
    assert len(steps) == 2
    for launch in steps:
        (programs,) = launch.grid
        assert 65_537 <= programs < 2**31


def test_rows_are_read_where_they_are():
    *_, launch = sample_launches(named(cases.samples("meta", torch.float16), "everything_packed"))
    a = arguments(launch)
    assert (a["x_row"], a["residual_row"]) == (3 * 24, 3 * 20)
    assert a["x_ptr"].stride() == (3 * 24, 1)
    (launch,) = sample_launches(named(cases.samples("meta", torch.float16), "plain_strided_width"))
    assert launch.args[0].is_contiguous()


@pytest.mark.parametrize(
    ("strides", "read"),
    [((40, 1), (40, 1)), ((45, 1), (45, 1)), ((1, 24), (1, 24)), ((0, 1), (0, 1)), ((80, 2), (40, 1))],
    ids=str,
)
def test_a_weight_of_consecutive_elements_is_read_where_it_is(strides, read):
    weight = torch.empty_strided((24, 40), strides, device="meta")
    (launch,) = sample_launches(Sample("strided", {"x": weight.new_empty(5, 40), "weight": weight}))
    a = arguments(launch)
    assert (a["weight_row"], a["weight_column"]) == read


def test_empty_results_need_no_launch():
    for name in ("no_rows_geglu", "empty_batch_none", "empty_batch_bare"):
        assert not sample_launches(named(cases.samples("cpu", torch.float32), name))


@pytest.mark.parametrize(
    "name", ["plain_contiguous", "everything_packed", "one_row_geglu", "one_feature_bare", "weight_transposed"]
)
def test_ahead_of_time_specialisation_is_tritons_own(name):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    for launch in sample_launches(named(cases.samples("cpu", torch.float16), name)):
        ours = triton_aot.specialise(launch.kernel, launch.args)
        bind = create_function_from_signature(
            launch.kernel.signature, launch.kernel.params, make_backend(GPUTarget("cuda", 80, 32))
        )
        _, theirs, _ = bind(*launch.args)
        assert list(ours.signature.values()) == [kind for kind, _ in theirs]
        for argument, (kind, key) in zip(launch.kernel.arg_names, theirs, strict=True):
            if kind != "constexpr":
                assert (argument in ours.divisible_by_16) == ("D" in (key or ""))


@pytest.mark.parametrize(
    ("rows", "channels", "out", "eps", "refused"),
    [
        (1, 2**30, 1, 1e-5, None),
        (1, 2**30 + 1, 1, 1e-5, ("weight", "channels", str(2**30), str(2**30 + 1))),
        (1, 1, 2**30, None, None),
        (1, 1, 2**30 + 1, None, ("weight", "rows", str(2**30), str(2**30 + 1))),
        (4 * (2**31 - 1), 1, 1, 1e-5, None),
        (4 * (2**31 - 1) + 1, 1, 1, 1e-5, ("x", str(2**31 - 1), str(2**31))),
        (128 * (2**31 - 1), 1, 1, None, None),
        (128 * (2**31 - 1) + 1, 1, 1, None, ("x", str(2**31 - 1), str(2**31))),
        (0, 1, 1, 1e-5, None),
    ],
)
def test_more_than_a_launch_has_is_refused(rows, channels, out, eps, refused):
    x = torch.empty(rows, channels, device="meta", dtype=torch.float16)
    steps = sample_launches(sample_of(x, out, norm_eps=eps))
    most = max((launch.grid[0] for launch in steps), default=0)
    with FakeTensorMode():
        x = torch.empty(rows, channels, device="cuda", dtype=torch.float16)
        sentence = triton_impl.reject(x, x.new_empty(out, channels), None, None, None, eps, "none", None)
    assert (sentence is not None) == (refused is not None)
    if refused is None:
        assert most < 2**31
    else:
        for word in (*refused, "backend='reference'"):
            assert word in sentence


@pytest.mark.parametrize(
    ("dtype", "given", "words"),
    [
        (torch.float64, {}, ("x", "float16, bfloat16 or float32", "torch.float64", "backend='reference'")),
        (torch.float16, {"bias": torch.float8_e5m2}, ("bias", "float64", "torch.float8_e5m2", "cast")),
        (torch.float16, {"norm_weight": torch.float8_e5m2}, ("norm_weight", "torch.float8_e5m2", "cast")),
        (torch.float16, {"norm_bias": torch.float8_e5m2}, ("norm_bias", "torch.float8_e5m2", "cast")),
        (torch.float16, {}, ("x", "GPU", "cpu", "backend='cpu'")),
    ],
    ids=("float64", "float8_bias", "float8_norm_weight", "float8_norm_bias", "on_the_cpu"),
)
def test_refusals(dtype, given, words):
    x, weight = torch.ones(3, 4, dtype=dtype), torch.ones(4, 4, dtype=dtype)
    parameters = dict.fromkeys(("bias", "norm_weight", "norm_bias"))
    parameters |= {name: torch.ones(4).to(kind) for name, kind in given.items()}
    sentence = triton_impl.reject(x, weight, *parameters.values(), 1e-5, "none", None)
    for word in words:
        assert word in sentence


def test_forced_on_the_cpu():
    with pytest.raises(BackendUnavailable, match=r"'triton' cannot be used: .*GPU.*backend='cpu'"):
        linear(torch.ones(3, 4), torch.ones(4, 4), backend="triton")


def test_missing_triton_is_a_refusal():
    program = """
        import sys
        sys.modules["triton"] = None
        import torch
        from fastsd_kernels.linear import op
        print(op.backends["triton"].reject(torch.ones(3, 4)))
    """
    child = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(program)], capture_output=True, text=True, check=True
    )
    assert "pip install triton" in child.stdout


def device_samples(dtype: torch.dtype) -> Iterator[Sample]:
    """The samples of the contract, and the projections of U-Nets."""
    like: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    yield from cases.samples("cuda", dtype)
    yield from cases.large_samples("cuda", dtype)
    for tokens, channels, out, activation, normed in (
        (4096, 320, 320, "none", True),
        (4096, 320, 2560, "geglu", True),
        (4096, 1280, 320, "none", False),
        (4096, 640, 640, "gelu", True),
        (1024, 640, 5120, "geglu", True),
        (256, 1280, 1280, "none", True),
        (64, 1280, 10240, "geglu", True),
        (64, 5120, 1280, "none", False),
        (77, 768, 320, "none", False),
        (77, 768, 3072, "quick_gelu", True),
    ):
        given: dict[str, Any] = {
            "x": random_tensor((2, tokens, channels), **like),
            "weight": random_tensor((out, channels), **like, seed=5) * channels**-0.5,
            "bias": random_tensor((out,), **like, seed=6),
            "activation": activation,
        }
        if normed:
            parameters = (random_tensor((channels,), **like, seed=seed) for seed in (1, 2))
            given |= dict(zip(("norm_weight", "norm_bias"), parameters, strict=True)) | {"norm_eps": 1e-5}
        elif tokens != 77:
            given["residual"] = random_tensor((2, tokens, out), **like, seed=8)
        yield Sample(f"{tokens}_{channels}_to_{out}_{activation}", given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_device(dtype):
    for sample in device_samples(dtype):
        try:
            check_op(op, sample, "triton")
            first, second = (linear(**sample.kwargs, backend="triton") for _ in range(2))
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
        except Exception as error:
            raise AssertionError(f"{sample}: {error}") from error
