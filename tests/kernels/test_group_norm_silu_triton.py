"""group_norm_silu in Triton: interpreted on the CPU, compiled for cards that are not here, and run on one that is."""

import inspect
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastsd_kernels import group_norm_silu
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.group_norm_silu import cases, op
from fastsd_kernels.testing import Sample, check_op, feature_map, named
from tests.proving import interpreter

triton_impl = op.backends["triton"].module
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile; unset it", allow_module_level=True)
triton_aot = pytest.importorskip("tests.budgets.triton_aot", reason="Triton is not installed")

SAMPLES = [sample.name for sample in cases.samples("cpu", torch.float32)]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("contiguous", "channels_last")

# With tiles this small a few hundred elements take the paths of large maps: groups over several channel tiles,
# splits of several tiles, statistics merged in several steps
SMALL_TILES = {
    "MOST_CHANNELS_LAST": 4,
    "MOST_CHANNELS_FIRST": 4,
    "FEWEST_LANES": 16,
    "MOST_LANES": 16,
    "FEWEST_POSITIONS_FIRST": 4,
    "MOST_PROGRAMS": 24,
    "MOST_MERGED": 4,
}
SMALL_TILE_SAMPLES = (
    "one_group_contiguous",
    "one_group_channels_last",
    "skip_contiguous_contiguous",
    "skip_channels_last_channels_last",
    "large_mean_contiguous",
    "nan_channels_last",
)


def launches(x: Tensor, num_groups: int, *, eps: float = 1e-5, activation: str = "silu", **tensors: Tensor):
    """The launches of one call of the public function, its tensors on ``meta``."""
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    optional = {name: meta.get(name) for name in ("weight", "bias", "channel_bias", "skip")}
    return triton_impl.launches(x.to("meta"), num_groups, eps=eps, activation=activation, **optional)[1]


def unet_sample(layout: str, dtype: torch.dtype, with_skip: bool) -> Sample:
    like = {"device": "cpu", "dtype": dtype}
    x = feature_map((1, 320, 64, 64), layout, **like)
    skip = {"skip": feature_map((1, 320, 64, 64), layout, **like)} if with_skip else {}
    channels = 640 if with_skip else 320
    parameters = {"weight": torch.ones(channels, **like), "bias": torch.ones(channels, **like)}
    channel_bias = torch.ones(1, channels, **like)
    return Sample("unet", {"x": x, "num_groups": 32, **parameters, "channel_bias": channel_bias, **skip})


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_interpreted(dtype, name):
    failure = interpreter.failures("group_norm_silu", dtype)[name]
    assert failure is None, failure


@pytest.mark.parametrize("name", SMALL_TILE_SAMPLES)
def test_interpreted_in_small_tiles(name):
    small = tuple(SMALL_TILES.items())
    results = interpreter.failures("group_norm_silu", "float32", names=SMALL_TILE_SAMPLES, constants=small, twice=True)
    assert results[name] is None, results[name]


def test_interpreter_refuses_bfloat16():
    failure = interpreter.failures("group_norm_silu", "bfloat16", names=("contiguous",))["contiguous"]
    assert "BackendUnavailable" in failure
    assert "bfloat16" in failure
    assert "TRITON_INTERPRET" in failure


def test_small_tiles_take_the_paths_of_large_maps(monkeypatch):
    for name, value in SMALL_TILES.items():
        monkeypatch.setattr(triton_impl, name, value)
    for channels_last in (False, True):
        wide_group = triton_impl.plan.__wrapped__(2, 6, 1, 20, channels_last, 4)
        assert wide_group.tiles_per_group == 2
        parts = wide_group.splits * wide_group.tiles_per_group
        assert parts > wide_group.block_p
        assert triton_impl.plan.__wrapped__(2, 20, 5, 30, channels_last, 4).tiles_per_split > 1


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_plan_covers_the_maps(itemsize, channels_last):
    for batch, channels, groups, space in (
        (1, 320, 32, 64 * 64),
        (2, 2560, 32, 8 * 8),
        (1, 128, 32, 1024 * 1024),
        (3, 30, 10, 63),
        (1, 640, 1, 5),
        (2, 7, 7, 1),
        (65_537, 4, 2, 2),
    ):
        plan = triton_impl.plan(batch, channels, groups, space, channels_last, itemsize)
        groups_covered = plan.channel_tiles // plan.tiles_per_group * plan.groups_per_tile
        assert groups <= groups_covered < groups + plan.groups_per_tile
        assert channels // groups * plan.groups_per_tile <= plan.block_c * plan.tiles_per_group
        positions = plan.splits * plan.tiles_per_split * plan.block_s
        assert space <= positions < space + plan.tiles_per_split * plan.block_s
        assert plan.groups_per_tile <= plan.block_g


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_sample_occupies_every_multiprocessor(layout):
    for launch in launches(**unet_sample(layout, torch.float16, False).kwargs):
        assert launch.grid[0] >= 132


def test_large_batches_stay_on_the_one_long_grid_axis():
    for launch in launches(torch.empty(70_000, 4, 2, device="meta"), 2):
        (programs,) = launch.grid
        assert programs >= 70_000


@pytest.mark.parametrize(
    "name", ["contiguous", "one_pixel_contiguous", "mixed_dtypes_channels_last", "bare_contiguous"]
)
def test_ahead_of_time_specialisation_is_tritons_own(name):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    sample = named(cases.samples("cpu", torch.float16), name)
    for launch in launches(**sample.kwargs):
        ours = triton_aot.specialise(launch.kernel, launch.args)
        backend = make_backend(GPUTarget("cuda", 80, 32))
        bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
        _, theirs, _ = bind(*launch.args)
        assert list(ours.signature.values()) == [kind for kind, _ in theirs]
        for argument, (kind, key) in zip(launch.kernel.arg_names, theirs, strict=True):
            if kind != "constexpr":
                assert (argument in ours.divisible_by_16) == ("D" in (key or ""))


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype", "words"),
    [
        (torch.float64, torch.float32, ("x", "float16, bfloat16 or float32", "torch.float64", "backend='reference'")),
        (torch.float16, torch.float8_e5m2, ("weight", "float64", "torch.float8_e5m2", "cast")),
        (torch.float16, torch.float16, ("GPU", "cpu", "backend='cpu'")),
    ],
    ids=("float64", "float8_weight", "on_the_cpu"),
)
def test_refusals(dtype, parameter_dtype, words):
    x, weight = torch.ones(1, 4, 2, dtype=dtype), torch.ones(4).to(parameter_dtype)
    sentence = triton_impl.reject(x, 2, weight, None, 1e-5, "silu", None, None)
    for word in words:
        assert word in sentence


def test_forced_on_the_cpu():
    with pytest.raises(BackendUnavailable, match=r"'triton' cannot be used: .*GPU.*backend='cpu'"):
        group_norm_silu(torch.ones(1, 4, 2), 2, backend="triton")


def test_constant_maps_give_exactly_zero():
    """A mean that is off by its own rounding shows here: it is multiplied by 1/sqrt(eps)."""
    program = """
        import torch
        from fastsd_kernels import group_norm_silu
        y = group_norm_silu(torch.full((1, 8, 37, 41), 30000.7), 2, activation="none", backend="triton")
        print(y.abs().max().item())
    """
    child = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(program)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(child.stdout) == 0


def test_missing_triton_is_a_refusal():
    program = """
        import sys
        sys.modules["triton"] = None
        import torch
        from fastsd_kernels.group_norm_silu import op
        print(op.backends["triton"].reject(torch.ones(1, 4, 2), 2, None, None, 1e-5, "silu", None, None))
    """
    child = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(program)], capture_output=True, text=True, check=True
    )
    assert "pip install triton" in child.stdout


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def device_samples(dtype: torch.dtype):
    """The samples of the contract, and maps of the sizes of U-Nets and decoders."""
    like = {"device": "cuda", "dtype": dtype}
    yield from cases.samples("cuda", dtype)
    yield from cases.large_samples("cuda", dtype)
    for layout in LAYOUTS:
        for shape, skip_channels, groups in (
            ((1, 320, 64, 64), 0, 32),
            ((2, 640, 64, 64), 320, 32),
            ((2, 1280, 8, 8), 1280, 32),
            ((1, 128, 512, 512), 0, 32),
            ((1, 640, 33, 31), 0, 1),
        ):
            channels = shape[1] + skip_channels
            skip_shape = (shape[0], skip_channels, *shape[2:])
            skip = {"skip": feature_map(skip_shape, layout, **like, seed=4)} if skip_channels else {}
            parameters = {"weight": torch.randn(channels, **like), "bias": torch.randn(channels, **like)}
            x = feature_map(shape, layout, **like)
            yield Sample(f"{shape}_{skip_channels}_{layout}", {"x": x, "num_groups": groups, **parameters, **skip})


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_device(dtype):
    for sample in device_samples(dtype):
        try:
            check_op(op, sample, "triton")
            first, second = (group_norm_silu(**sample.kwargs, backend="triton") for _ in range(2))
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
        except Exception as error:
            raise AssertionError(f"{sample}: {error}") from error


def test_a_missing_compiler_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    assert triton_impl.unavailable.__wrapped__() is None
    monkeypatch.setenv("PATH", "")
    assert "install gcc or clang" in triton_impl.unavailable.__wrapped__()
