"""resnet_block in Triton: interpreted on the CPU, compiled for cards that are not here, and run on one that is."""

import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd_kernels import resnet_block
from fastsd_kernels.conv2d import op as conv2d_op
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.resnet_block import cases, op
from fastsd_kernels.testing import Sample, check_op, feature_map, named
from fastsd_kernels.testing.inputs import random_tensor
from tests.proving import interpreter

triton_impl, conv2d_impl = (of.backends["triton"].module for of in (op, conv2d_op))
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile; unset it", allow_module_level=True)
triton_aot = pytest.importorskip("tests.budgets.triton_aot", reason="Triton is not installed")

from tests.budgets.ops.resnet_block import moment_launches  # noqa: E402

ROOT = Path(__file__).parents[2]
SAMPLES = [sample.name for sample in cases.samples("cpu", torch.float32)]
PRUNED = [name for name in SAMPLES if name.startswith("pruned")]
BLOCKS = [name for name in SAMPLES if name not in PRUNED and not name.startswith("empty")]

# Of conv2d: with tiles this small a few hundred elements are many tiles of positions, the last one ragged, and the
# product is split from 17 channels on
SMALL_TILES = {
    "MOST_M": 16,
    "MOST_N": 16,
    "MOST_K": 16,
    "FEWEST_PROGRAMS": 24,
    "FEWEST_STEPS": 6,
    "SUM_M": 8,
    "SUM_N": 4,
}
# And of this op: moments and channels of a group take several steps
SMALL_STEPS = {"MOST_MERGED": 4, "MOST_CHANNELS": 2}
SMALL_TILE_SAMPLES = (
    "off_vector_width_contiguous",
    "skip_channels_last_sliced_channels",
    "one_group_channels_last",
    "one_channel_a_group_contiguous",
    "one_row_channels_last",
    "everything_channels_last",
    "large_mean_contiguous",
    "scale_shift_channels_last",
    "nan_channels_last",
)


# conv2d's tests have every case in both dtypes
IN_FLOAT16 = ("everything_contiguous", "large_mean_channels_last", "skip_contiguous_channels_last", "nan_channels_last")


def sample_launches(sample: Sample):
    """The launches of one call of the public function, its tensors on ``meta``."""
    parameters = inspect.signature(resnet_block).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    del defaults["backend"]
    meta = sample.map_tensors(lambda tensor: tensor.to("meta")).kwargs
    return triton_impl.launches(**defaults | meta)[1]


def arguments(launch) -> dict[str, Any]:
    return dict(zip(launch.kernel.arg_names, launch.args, strict=True))


@pytest.mark.parametrize("name", SAMPLES)
def test_interpreted(name):
    failure = interpreter.failures("resnet_block", "float32", names=tuple(SAMPLES))[name]
    assert failure is None, failure


@pytest.mark.parametrize("name", IN_FLOAT16)
def test_interpreted_in_float16(name):
    failure = interpreter.failures("resnet_block", "float16", names=IN_FLOAT16)[name]
    assert failure is None, failure


def interpret(program: str, *args: str) -> str:
    """What ``program`` prints that has small tiles, in a process where Triton's kernels are interpreted."""
    small = f"""
        from fastsd_kernels.conv2d import triton_impl as conv2d_impl
        from fastsd_kernels.resnet_block import triton_impl

        vars(conv2d_impl).update({SMALL_TILES})
        vars(triton_impl).update({SMALL_STEPS})
    """
    child = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(small) + "\n" + inspect.cleandoc(program), *args],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


@functools.cache
def small_tile_failures() -> dict[str, str | None]:
    program = "from tests.proving import interpreter; interpreter._main()"
    return json.loads(interpret(program, "resnet_block", "float32", "--twice", "--samples", *SMALL_TILE_SAMPLES))


@pytest.mark.parametrize("name", SMALL_TILE_SAMPLES)
def test_interpreted_in_small_tiles(name):
    assert small_tile_failures()[name] is None, small_tile_failures()[name]


def test_small_tiles_take_the_paths_of_large_maps(monkeypatch):
    for module, constants in ((conv2d_impl, SMALL_TILES), (triton_impl, SMALL_STEPS)):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(conv2d_impl, "plan", conv2d_impl.plan.__wrapped__)
    paths = set()
    for name in SMALL_TILE_SAMPLES:
        launches = sample_launches(named(cases.samples("cpu", torch.float32), name))
        writer, merge = moment_launches(launches)
        merged = arguments(merge)
        ragged = merged["positions"] % merged["TILE_POSITIONS"] > 0
        several = merged["tiles"] * merged["GROUP_CHANNELS"] > merged["BLOCK_P"]
        paths.add((writer.kernel.__name__, merged["tiles"] > 1, ragged, several))
        paths.add(("channels in several steps", merged["GROUP_CHANNELS"] > merged["BLOCK_C"]))
    assert paths > {("convolve", True, True, True), ("sum_splits", True, True, True)}
    assert ("channels in several steps", True) in paths


def test_the_moments_are_those_of_the_rounded_map():
    """A constant map in the middle becomes exactly 0, also where it is not what the convolution had computed."""
    interpret("""
        import torch
        from fastsd_kernels import resnet_block

        torch.use_deterministic_algorithms(True)
        for dtype, value in ((torch.float16, 299.9), (torch.float32, 30000.7)):
            assert dtype == torch.float32 or torch.tensor(value, dtype=dtype).item() != value
            for channels in (8, 32):  # one split, and three
                x, weight = torch.randn(1, channels, 5, 7).to(dtype), (channels, channels, 3, 3)
                zeros, ones, bias = x.new_zeros(weight), x.new_ones(weight), torch.full((channels,), value)
                y = resnet_block(x, zeros, ones, bias, num_groups=2, backend="triton")
                assert torch.equal(y, x), (y - x).abs().max()
    """)


@pytest.mark.parametrize("name", BLOCKS)
def test_no_pass_over_the_map_in_the_middle(name):
    launches = sample_launches(named(cases.samples("cpu", torch.float16), name))
    names = [launch.kernel.__name__ for launch in launches if launch.kernel.__name__ != "sum_splits"]
    shortcut = ["convolve"] * names.count("convolve")
    assert names == [
        *shortcut[2:],
        "group_statistics",
        "norm_coefficients",
        "convolve",
        "moment_coefficients",
        "convolve",
    ]
    # what the first convolution leaves is what is merged, and what comes of that is what the second one reads
    first, merge, second = map(arguments, launches[-3:])
    assert first["moments_ptr"] is merge["moments_ptr"]
    assert first["y_ptr"] is second["x_ptr"]
    assert merge["coefficients_ptr"] is second["coefficients_ptr"]
    assert second["moments_ptr"] is None


@pytest.mark.parametrize("name", [name for name in SAMPLES if name.startswith(("pruned", "empty"))])
def test_blocks_without_convolutions(name):
    launches = sample_launches(named(cases.samples("cpu", torch.float16), name))
    expected = ["convolve"] if name.startswith("pruned") and "identity" not in name else []
    assert [launch.kernel.__name__ for launch in launches] == expected


def test_large_batches_stay_on_the_one_long_grid_axis():
    for sample in cases.large_samples("meta", torch.float16):
        for launch in sample_launches(sample):
            (programs,) = launch.grid
            assert 65_537 <= programs < 2**31


def test_ahead_of_time_specialisation_is_tritons_own():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    for launch in sample_launches(named(cases.samples("cpu", torch.float16), "everything_contiguous")):
        ours = triton_aot.specialise(launch.kernel, launch.args)
        bind = create_function_from_signature(
            launch.kernel.signature, launch.kernel.params, make_backend(GPUTarget("cuda", 80, 32))
        )
        _, theirs, _ = bind(*launch.args)
        assert list(ours.signature.values()) == [kind for kind, _ in theirs]


@pytest.mark.parametrize(
    ("x", "given", "words"),
    [
        (torch.float64, {}, ("x", "float16, bfloat16 or float32", "torch.float64", "backend='reference'")),
        (torch.float16, {"conv2_bias": torch.float8_e5m2}, ("conv2_bias", "torch.float8_e5m2", "cast")),
        (torch.float16, {"norm2_weight": torch.float8_e5m2}, ("norm2_weight", "torch.float8_e5m2", "cast")),
        (torch.float16, {}, ("GPU", "cpu", "backend='cpu'")),
    ],
    ids=("float64", "float8_bias", "float8_norm", "on_the_cpu"),
)
def test_refusals(x, given, words):
    names = list(inspect.signature(triton_impl.reject).parameters)
    arguments = dict.fromkeys(names) | {"x": torch.ones(1, 4, 3, 3, dtype=x)}
    sentence = triton_impl.reject(**arguments | {name: torch.ones(4).to(dtype) for name, dtype in given.items()})
    for word in words:
        assert word in sentence


def test_interpreter_refuses_bfloat16():
    failure = interpreter.failures("resnet_block", "bfloat16", names=("one_pixel_contiguous",))["one_pixel_contiguous"]
    for words in ("BackendUnavailable", "bfloat16", "TRITON_INTERPRET"):
        assert words in failure


def test_forced_on_the_cpu():
    weight = torch.ones(4, 4, 3, 3)
    with pytest.raises(BackendUnavailable, match=r"'triton' cannot be used: .*GPU.*backend='cpu'"):
        resnet_block(torch.ones(1, 4, 3, 3), weight, weight, num_groups=2, backend="triton")


def test_missing_triton_is_a_refusal():
    program = """
        import sys
        sys.modules["triton"] = None
        import torch
        from fastsd_kernels.resnet_block import op
        print(op.backends["triton"].reject(torch.ones(1, 4, 2, 2)))
    """
    child = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(program)], capture_output=True, text=True, check=True
    )
    assert "pip install triton" in child.stdout


def device_samples(dtype: torch.dtype):
    """The samples of the contract, and blocks of U-Nets and decoders."""
    like = {"device": "cuda", "dtype": dtype}
    yield from cases.samples("cuda", dtype)
    yield from cases.large_samples("cuda", dtype)
    for layout in ("contiguous", "channels_last"):
        for batch, x_channels, skip_channels, out_channels, side in (
            (1, 320, 0, 320, 64),
            (2, 640, 320, 640, 32),
            (1, 1280, 1280, 1280, 8),
            (1, 128, 0, 128, 128),
        ):
            channels = x_channels + skip_channels
            given = {"x": feature_map((batch, x_channels, side, side), layout, **like)}
            if skip_channels:
                given["skip"] = feature_map((batch, skip_channels, side, side), layout, **like, seed=13)
            given["channel_bias"] = random_tensor((batch, out_channels), **like, seed=11)
            name = f"{batch}x{channels}to{out_channels}_{side}_{layout}"
            yield Sample(name, given | cases.block(channels, out_channels, 32, **like))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_on_the_device(dtype):
    for sample in device_samples(dtype):
        try:
            check_op(op, sample, "triton")
            first, second = (resnet_block(**sample.kwargs, backend="triton") for _ in range(2))
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
        except Exception as error:
            raise AssertionError(f"{sample}: {error}") from error
