"""conv2d in Triton: interpreted on the CPU, compiled for cards that are not here, and run on one that is."""

import inspect
import itertools
import os
import subprocess
import sys

import pytest
import torch

from fastsd_kernels import conv2d
from fastsd_kernels.conv2d import cases, measured, op
from fastsd_kernels.conv2d.triton_tiles import TILES
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.testing import Sample, check_op, feature_map, named
from fastsd_kernels.testing.inputs import random_tensor
from tests.proving import interpreter

triton_impl = op.backends["triton"].module
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile; unset it", allow_module_level=True)
triton_aot = pytest.importorskip("tests.budgets.triton_aot", reason="Triton is not installed")

from tests.budgets.ops.conv2d import TRITON, triton_launches  # noqa: E402

ALL = list(cases.samples("cpu", torch.float32))
SAMPLES = [sample.name for sample in ALL if sample.kwargs.get("algorithm") in (None, "implicit_gemm")]
REFUSED = [sample.name for sample in ALL if sample.name not in SAMPLES]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SD_SHAPES = (  # batch, channels of x and skip, output channels, positions, side of the kernel
    (1, 320, 0, 320, 64 * 64, 3),
    (2, 640, 320, 640, 32 * 32, 3),
    (1, 1280, 0, 1280, 16 * 16, 3),
    (1, 1280, 1280, 1280, 8 * 8, 3),
    (2, 1280, 640, 1280, 16 * 16, 1),
    (1, 4, 0, 320, 64 * 64, 3),
    (1, 128, 0, 3, 512 * 512, 3),
    (3, 30, 7, 19, 63, 3),
    (65_537, 4, 0, 4, 4, 3),
)

# With tiles this small a few hundred elements take the paths of large maps: several tiles of either kind, splits that
# begin or end at the seam of x and skip, sums of splits over several tiles
SMALL_TILES = {
    "MOST_M": 16,
    "MOST_N": 16,
    "MOST_K": 16,
    "FEWEST_PROGRAMS": 24,
    "FEWEST_STEPS": 4,
    "SUM_M": 8,
    "SUM_N": 4,
}
SMALL_TILE_SAMPLES = (
    "many_tiles_contiguous",
    "everything_channels_last",
    "vector_width_channels_last",
    "skip_contiguous_sliced_channels",
    "skip_channels_last_channels_last",
    "pointwise_everything_channels_last",
    "upsampled_everything_contiguous",
    "residual_in_other_layout_channels_last",
    "nan_channels_last",
)


def sample_launches(sample: Sample):
    """The launches of one call of the public function, its tensors on ``meta``."""
    meta = sample.map_tensors(lambda tensor: tensor.to("meta")).kwargs
    padding = meta.get("padding", 0)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(conv2d).parameters.items()
        if parameter.default is not inspect.Parameter.empty and name != "backend"
    }
    padding = [padding] * 4 if isinstance(padding, int) else padding
    return triton_impl.launches(**defaults | meta | {"padding": padding})[1]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_interpreted(dtype, name):
    failure = interpreter.failures("conv2d", dtype, names=tuple(SAMPLES))[name]
    assert failure is None, failure


@pytest.mark.parametrize("name", SMALL_TILE_SAMPLES)
def test_interpreted_in_small_tiles(name):
    small = tuple(SMALL_TILES.items())
    results = interpreter.failures("conv2d", "float32", names=SMALL_TILE_SAMPLES, constants=small, twice=True)
    assert results[name] is None, results[name]


def test_small_tiles_take_the_paths_of_large_maps(monkeypatch):
    for name, value in SMALL_TILES.items():
        monkeypatch.setattr(triton_impl, name, value)
    with_skip = triton_impl.plan.__wrapped__(2, 16, 4, 8, 30, 3, 4)
    assert with_skip.row_tiles > 1
    assert with_skip.splits > 2
    # the seam is behind the ninth step, within a split
    assert 9 % with_skip.steps_per_split
    many = triton_impl.plan.__wrapped__(1, 16, 0, 16, 37 * 21, 3, 4)
    assert many.row_tiles > 2 * 8
    assert triton_impl.plan.__wrapped__(2, 32, 0, 32, 64, 3, 4).column_tiles > 1


def test_results_that_are_exact():
    """Nearest neighbours at sizes where float32 rounds, and the norm of a constant map, whose mean must be exact."""
    program = """
        import torch
        from fastsd_kernels import conv2d

        torch.use_deterministic_algorithms(True)
        for size, enlarged in ((2, 82), (3, 123), (6, 74), (9, 111)):
            x = torch.arange(float(size)).view(1, 1, 1, size)
            expected = torch.nn.functional.interpolate(x, (1, enlarged), mode="nearest")
            assert not torch.equal(expected.flatten(), (torch.arange(enlarged) * size // enlarged).float())
            actual = conv2d(x, torch.ones(1, 1, 1, 1), upsample_size=(1, enlarged), backend="triton")
            assert torch.equal(actual, expected), (size, enlarged)

        x, weight = torch.full((1, 8, 37, 41), 30000.7), torch.ones(1, 8, 3, 3)
        y = conv2d(x, weight, padding=1, num_groups=2, backend="triton")
        assert (y == 0).all(), y.abs().max()
    """
    child = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(program)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", SD_SHAPES, ids=str)
def test_plan_covers_the_product(shape, itemsize):
    _, x_channels, skip_channels, out_channels, positions, kernel = shape
    plan = triton_impl.plan(*shape, itemsize)
    tile = plan.tile
    assert positions <= plan.row_tiles * tile.block_m < positions + tile.block_m
    assert out_channels <= plan.column_tiles * tile.block_n < out_channels + tile.block_n
    steps = sum(-(-channels // tile.block_k) for channels in (x_channels, skip_channels)) * kernel**2
    assert steps <= plan.splits * plan.steps_per_split < steps + plan.steps_per_split


@pytest.mark.parametrize("shape", [shape for shape in SD_SHAPES if min(shape[1], shape[3]) >= 320], ids=str)
def test_one_sample_occupies_most_multiprocessors(shape):
    batch, *_ = shape
    plan = triton_impl.plan(*shape, 2)
    assert batch * plan.row_tiles * plan.column_tiles * plan.splits >= 80


def test_large_batches_stay_on_the_one_long_grid_axis():
    for sample in cases.large_samples("meta", torch.float16):
        for launch in sample_launches(sample):
            (programs,) = launch.grid
            assert 65_537 <= programs < 2**31


def test_every_tile_has_a_gate():
    gated = {
        (launch.args[-4:-1], launch.num_warps, launch.args[0].element_size())
        for *variant, _ in TRITON
        for launch in triton_launches(*variant)
        if launch.kernel.__name__ == "convolve"
    }
    guesses = (
        (triton_impl.tile(positions, out_channels, itemsize), itemsize)
        for positions, out_channels, itemsize in itertools.product((1, 64, 65, 4096), (1, 16, 17, 320, 640), (2, 4))
    )
    for (*block, num_warps), itemsize in (*guesses, *((tile, 2) for tile in TILES.values())):
        assert (tuple(block), num_warps, itemsize) in gated


@pytest.mark.parametrize("name", TILES)
def test_measured_tile_is_taken(name):
    sample = next(sample for sample in cases.samples("cpu", torch.float16) if sample.name == "everything_channels_last")
    with measured.forced(f"triton {name}"):
        launches = sample_launches(sample)
        other = sample_launches(sample.map_tensors(torch.Tensor.float))
    (convolve,) = (launch for launch in launches if launch.kernel.__name__ == "convolve")
    assert (*convolve.args[-4:-1], convolve.num_warps) == TILES[name]
    (convolve,) = (launch for launch in other if launch.kernel.__name__ == "convolve")
    assert (*convolve.args[-4:-1], convolve.num_warps) == triton_impl.tile(30, 16, 4)


@pytest.mark.parametrize("name", ["plain_contiguous", "one_pixel_channels_last", "upsampled_everything_contiguous"])
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


def refusal(x: torch.Tensor, algorithm: str | None = None, bias: torch.Tensor | None = None) -> str | None:
    weight = torch.ones(4, 4, 3, 3, dtype=x.dtype)
    norm = (0, None, None, 1e-5, None, None)
    return triton_impl.reject(x, weight, bias, 1, [1] * 4, None, *norm, "none", None, None, None, 1.0, algorithm)


@pytest.mark.parametrize(
    ("x", "given", "words"),
    [
        (torch.float64, {}, ("x", "float16, bfloat16 or float32", "torch.float64", "backend='reference'")),
        (torch.float16, {"bias": torch.ones(4).to(torch.float8_e5m2)}, ("bias", "torch.float8_e5m2", "cast")),
        (torch.float16, {}, ("GPU", "cpu", "backend='cpu'")),
        (torch.float16, {"algorithm": "implicit_gemm"}, ("GPU", "cpu", "backend='cpu'")),
        (torch.float16, {"algorithm": "winograd4"}, ("implicit_gemm", "winograd4", "leave it out")),
    ],
    ids=("float64", "float8_bias", "on_the_cpu", "its_algorithm", "another_algorithm"),
)
def test_refusals(x, given, words):
    sentence = refusal(torch.ones(1, 4, 3, 3, dtype=x), **given)
    for word in words:
        assert word in sentence


def test_interpreter_refuses_bfloat16_and_other_algorithms():
    assert REFUSED
    failures = interpreter.failures("conv2d", "bfloat16", names=("plain_contiguous", *REFUSED))
    for words in ("BackendUnavailable", "bfloat16", "TRITON_INTERPRET"):
        assert words in failures["plain_contiguous"]
    for name in REFUSED:
        for words in ("BackendUnavailable", "implicit_gemm", repr(named(ALL, name).kwargs["algorithm"])):
            assert words in failures[name]


def test_forced_on_the_cpu():
    with pytest.raises(BackendUnavailable, match=r"'triton' cannot be used: .*GPU.*backend='cpu'"):
        conv2d(torch.ones(1, 4, 3, 3), torch.ones(4, 4, 3, 3), backend="triton")


def test_missing_triton_is_a_refusal():
    program = """
        import sys
        sys.modules["triton"] = None
        import torch
        from fastsd_kernels.conv2d import op
        print(op.backends["triton"].reject(torch.ones(1, 4, 2, 2)))
    """
    child = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(program)], capture_output=True, text=True, check=True
    )
    assert "pip install triton" in child.stdout


def device_samples(dtype: torch.dtype):
    """The samples of the contract that the backend serves, and convolutions of U-Nets and decoders."""
    like = {"device": "cuda", "dtype": dtype}
    yield from (sample for sample in cases.samples("cuda", dtype) if sample.name in SAMPLES)
    yield from cases.large_samples("cuda", dtype)
    for layout in ("contiguous", "channels_last"):
        for batch, x_channels, skip_channels, out_channels, side, upsample in (
            (1, 320, 0, 320, 64, None),
            (2, 640, 320, 640, 32, None),
            (1, 1280, 1280, 1280, 8, None),
            (1, 1280, 0, 1280, 16, (32, 32)),
            (1, 4, 0, 320, 64, None),
            (1, 128, 0, 3, 128, None),
        ):
            channels = x_channels + skip_channels
            given = {
                "x": feature_map((batch, x_channels, side, side), layout, **like),
                "weight": random_tensor((out_channels, channels, 3, 3), **like) * (9 * channels) ** -0.5,
                "bias": random_tensor((out_channels,), **like),
                "padding": 1,
                "upsample_size": upsample,
            }
            if skip_channels:
                given["skip"] = feature_map((batch, skip_channels, side, side), layout, **like, seed=4)
            if channels % 32 == 0:
                parameters = (random_tensor((channels,), **like, seed=seed) for seed in (1, 2))
                given |= dict(zip(("norm_weight", "norm_bias"), parameters, strict=True))
                given |= {"num_groups": 32, "activation": "silu"}
            yield Sample(f"{batch}x{channels}to{out_channels}_{side}_{layout}", given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_device(dtype):
    for sample in device_samples(dtype):
        try:
            check_op(op, sample, "triton")
            first, second = (conv2d(**sample.kwargs, backend="triton") for _ in range(2))
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
        except Exception as error:
            raise AssertionError(f"{sample}: {error}") from error
