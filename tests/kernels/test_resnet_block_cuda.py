"""resnet_block's CUDA path: conv2d's kernels with moments in between, on the host, thread by thread, and on a card."""

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastsd_kernels import cuda_runtime, resnet_block
from fastsd_kernels.conv2d import cuda_impl as conv2d
from fastsd_kernels.conv2d import measured
from fastsd_kernels.layout import is_channels_last, is_dense
from fastsd_kernels.resnet_block import cases, cuda_impl, op
from fastsd_kernels.testing import Sample, assert_contract, check_op, feature_map, named
from tests.harness import host

DTYPES = (torch.float16, torch.bfloat16)
SAMPLES = [sample.name for sample in cases.samples("cpu", torch.float32)]
MULTIPROCESSORS = 132
# Elements of one size are accessed alike, so bfloat16 is left out
SANITIZED_SAMPLES = ("everything_contiguous", "off_vector_width_channels_last", "many_tiles_channels_last")
SANITIZED_CUTS = ("largest_tile", "long_row")
FIRST_CONVOLUTION = ["group_norm_silu_stats", "conv2d_coefficients", "conv2d_implicit_gemm"]
MOMENTS_ARGUMENT = {"conv2d_implicit_gemm": 9, "conv2d_coefficients": 1}

SANITIZED = """
from tests.kernels import test_resnet_block_cuda as tests
wanted = [*map(tests.sample_of, tests.SANITIZED_SAMPLES), *map(tests.cut, tests.SANITIZED_CUTS)]
tests.build_for(wanted)
for sample in wanted:
    tests.assert_right(sample)
print("right:", len(wanted))
"""

# One number less than the kernel, named by the argument, needs
PLANTED = """
import sys
from tests.kernels import test_resnet_block_cuda as tests
def launch(source, kernel, defines, *, args, **rest):
    at = tests.MOMENTS_ARGUMENT.get(kernel)
    if kernel == sys.argv[1] and args[at] is not None:
        args[at] = args[at].flatten()[:-1].clone()
    tests.host.launch(source, kernel, defines, args=args, **rest)
tests.compute(tests.sample_of("everything_contiguous"), launch)
"""

# conv2d's tests have every case in both dtypes; each costs the compiler a variant of the source
IN_BFLOAT16 = (
    "everything_contiguous",
    "large_mean_channels_last",
    "skip_contiguous_channels_last",
    "nan_channels_last",
)
ON_THE_HOST = [
    *((torch.float16, name) for name in SAMPLES),
    *((torch.bfloat16, name) for name in IN_BFLOAT16),
]
# Maps that end inside a tile, and inside a warp's patch of it: shape of x, output channels, the tile that they must get
CUTS = {
    "largest_tile": ((1, 8, 7, 15), 120, (8, 16, 128)),
    "wide_tile": ((1, 16, 15, 29), 40, (8, 16, 16)),
    "small_tile": ((2, 8, 13, 7), 24, (8, 8, 32)),
    "smallest_tile": ((1, 8, 3, 5), 16, (4, 8, 16)),
    "long_row": ((1, 8, 1, 100), 24, (1, 128, 32)),
    "row": ((1, 8, 2, 40), 24, (1, 64, 32)),
}


@pytest.fixture(scope="module")
def libraries():
    """All variants that the samples need, compiled side by side."""
    build_for([*(sample_of(name, dtype) for dtype, name in ON_THE_HOST), *map(cut, CUTS)])


def sample_of(name, dtype=torch.float16):
    return named(cases.samples("cpu", dtype), name)


def sample(shape, out_channels, dtype=torch.float16, **changes):
    like: dict[str, Any] = {"device": "cpu", "dtype": dtype}
    x = feature_map(shape, "channels_last", **like)
    return Sample("made", {"x": x} | cases.block(shape[1], out_channels, 4, **like) | changes)


def cut(name):
    shape, out_channels, _ = CUTS[name]
    return sample(shape, out_channels)


def build_for(samples):
    host.build({(launch["source"], launch["defines"]): None for sample in samples for launch in launches_of(sample)})


def launches_of(sample, multiprocessors=MULTIPROCESSORS):
    noted = []

    def note(source, kernel, defines, **launch):
        noted.append({"source": source, "kernel": kernel, "defines": defines, **launch})

    compute(sample, note, multiprocessors)
    return noted


def arguments(sample):
    bound = inspect.signature(resnet_block).bind(**sample.kwargs)
    bound.apply_defaults()
    return list(bound.arguments.values())[:-1]


def compute(sample, launch=host.launch, multiprocessors=MULTIPROCESSORS):
    return cuda_impl.compute(launch, multiprocessors, *arguments(sample))


def assert_right(sample, multiprocessors=MULTIPROCESSORS):
    """Within the contract, dense in x's layout, and the same bits in the opposite order of threads."""
    actual = compute(sample, host.launch, multiprocessors)
    assert is_dense(actual, is_channels_last(sample.kwargs["x"]))
    plain = resnet_block(**sample.kwargs, backend="reference")
    exact = resnet_block(**sample.map_tensors(Tensor.double).kwargs, backend="reference")
    assert_contract(actual, exact, plain)
    again = compute(sample, functools.partial(host.launch, seed=1), multiprocessors)
    torch.testing.assert_close(again, actual, rtol=0, atol=0, equal_nan=True)


def first_convolution(sample):
    """The map between the convolutions and its moments."""
    a = dict(zip(inspect.signature(resnet_block).parameters, arguments(sample), strict=False))
    norm = (a["num_groups"], a["norm1_weight"], a["norm1_bias"], a["eps"], None, None, "silu", None)
    rest = (a["conv1_bias"], 1, [1] * 4, a["skip"], *norm, a["channel_bias"], None, 1.0)
    return conv2d.convolve(host.launch, MULTIPROCESSORS, a["x"], a["conv1_weight"], *rest, note_moments=True)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(("dtype", "name"), ON_THE_HOST, ids=str)
def test_contract(dtype, name):
    assert_right(sample_of(name, dtype))


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", CUTS)
def test_maps_that_end_inside_a_tile(name):
    height, width, channels = CUTS[name][2]
    convolutions = [launch for launch in launches_of(cut(name)) if launch["kernel"] == "conv2d_implicit_gemm"]
    tile = {f"TILE_H={height}", f"TILE_W={width}", f"TILE_K={channels}", "MOMENTS=1"}
    assert any(tile <= set(launch["defines"]) for launch in convolutions)
    assert_right(cut(name), multiprocessors=1)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("far", [0.0, 2000.0])
def test_moments_are_those_of_the_map_as_it_is_stored(name, far):
    """Also where deviations are small beside the mean: none of it cancels."""
    given = cut(name)
    channels = given.kwargs["conv1_weight"].shape[0]
    given.kwargs["channel_bias"] = far + torch.linspace(-2, 2, channels).half()[None]
    h, moments = first_convolution(given)
    assert moments.patch in ((2, 16), (4, 8), (1, 32))
    (height, width), (rows, columns) = moments.patch, moments.values.shape[1:3]
    for row in range(rows):
        for column in range(columns):
            piece = h[:, :, row * height :, column * width :][:, :, :height, :width].double().flatten(2)
            mean, m2 = moments.values[:, row, column].double().unbind(-1)
            torch.testing.assert_close(mean, piece.mean(2), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(m2, piece.var(2, correction=0) * piece.shape[2], rtol=1e-5, atol=1e-5)


def test_a_constant_map_has_no_variance():
    """Nor does the error of rounding it become a deviation, which 1/√eps would magnify."""
    given = sample((1, 8, 7, 9), 16)
    given.kwargs["conv1_weight"].zero_()
    assert_right(Sample("constant", given.kwargs | {"channel_bias": torch.full((1, 16), 300.3)}))


def test_a_map_that_overflows():
    """Its group has no mean, so there is NaN where a finite mean would leave the infinity as it is."""
    bias = torch.zeros(2, 16)
    bias[0, 5] = 1e5
    given = sample((2, 8, 7, 9), 16, channel_bias=bias, norm2_weight=None)
    given.kwargs["conv2_weight"].abs_()
    assert compute(given)[0].isnan().all()
    assert_right(given)


def test_one_split_needs_no_pass_over_the_map_between():
    given = sample((2, 64, 9, 9), 64)
    assert [launch["kernel"] for launch in launches_of(given, multiprocessors=1)] == [
        *FIRST_CONVOLUTION,
        *("conv2d_coefficients", "conv2d_implicit_gemm"),
    ]
    assert_right(given, multiprocessors=1)


def test_several_splits_need_it():
    given = sample((2, 64, 9, 9), 64)
    assert [launch["kernel"] for launch in launches_of(given)] == [*FIRST_CONVOLUTION, "conv2d_reduce"] * 2
    assert_right(given)


@pytest.mark.parametrize(("side", "channels", "batch", "patch"), [(64, 320, 2, (2, 16)), (32, 640, 2, None)])
def test_plan_notes_moments_where_the_card_is_full(side, channels, batch, patch):
    """Stable Diffusion 1.5 at 512²."""
    plan = conv2d.plan(
        batch=batch,
        x_channels=channels,
        skip_channels=0,
        num_groups=32,
        kernel=3,
        stride=1,
        out_channels=channels,
        out_height=side,
        out_width=side,
        dtype=torch.float16,
        parameter_dtype=torch.float16,
        alignment=16,
        out_alignment=16,
        multiprocessors=MULTIPROCESSORS,
        moments=True,
    )
    assert plan.patch == patch
    assert (plan.splits == 1) == (patch is not None) == ("MOMENTS=1" in plan.defines)


def test_only_the_first_convolution_notes_moments():
    shortcut, first, second = (
        launch for launch in launches_of(sample((1, 8, 4, 4), 16)) if launch["kernel"] == "conv2d_implicit_gemm"
    )
    assert ["MOMENTS=1" in launch["defines"] for launch in (shortcut, first, second)] == [False, True, False]
    at = MOMENTS_ARGUMENT["conv2d_implicit_gemm"]
    assert [launch["args"][at] is None for launch in (shortcut, first, second)] == [True, False, True]


def test_sanitized():
    """No access outside a tensor or outside shared memory, no misaligned one and no undefined arithmetic."""
    done = host.run_sanitized(SANITIZED)
    assert done.returncode == 0, done.stderr
    assert f"right: {len(SANITIZED_SAMPLES) + len(SANITIZED_CUTS)}" in done.stdout


@pytest.mark.parametrize("kernel", MOMENTS_ARGUMENT)
def test_sanitizer_catches_moments_of_a_wrong_size(kernel):
    done = host.run_sanitized(PLANTED, kernel)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert kernel in done.stderr


def test_other_devices_are_refused():
    given = sample_of("everything_contiguous")
    assert cuda_impl.reject(*arguments(given)) == "x is on cpu; the cuda backend needs CUDA tensors"
    with FakeTensorMode():
        for dtype in (*DTYPES, torch.float32, torch.float64):
            elsewhere = given.map_tensors(lambda t, dtype=dtype: torch.empty(t.shape, device="cuda", dtype=dtype))
            assert cuda_impl.reject(*arguments(elsewhere)) is None


CONVOLUTIONS = ((16, 8, 3, 3), (16, 16, 3, 3), (16, 8, 1, 1))  # of the sample below: both, and the shortcut


@pytest.mark.parametrize(
    ("fastest", "chosen"),
    [
        (("implicit_gemm",) * 3, "implicit_gemm"),
        (("implicit_gemm", "direct", "implicit_gemm"), "composed"),
        (("direct", "implicit_gemm", "implicit_gemm"), "composed"),
        (("implicit_gemm", "implicit_gemm", None), "composed"),
        (("triton 64x64",) * 3, "composed"),
        ((None,) * 3, "composed"),
    ],
    ids=str,
)
def test_measurements_of_all_convolutions_decide(monkeypatch, fastest, chosen):
    called = []
    x = torch.ones(2, 16, 5, 3).half()
    table = dict(zip(CONVOLUTIONS, fastest, strict=True))
    monkeypatch.setattr(measured, "fastest", lambda x, weight, *rest: table.get(tuple(weight.shape)))
    monkeypatch.setattr(cuda_impl, "compute", lambda *args: called.append("implicit_gemm") or x)
    monkeypatch.setattr(cuda_impl, "compose", lambda *args: called.append("composed") or x)
    monkeypatch.setattr(cuda_runtime, "multiprocessors", lambda device: MULTIPROCESSORS)
    given = sample_of("everything_channels_last")
    cuda_impl.run(*arguments(given))
    cuda_impl.run(*arguments(given.map_tensors(Tensor.float)))
    cuda_impl.run(*arguments(sample_of("pruned_identity_contiguous")))
    assert called == [chosen, "composed", "composed"]


@pytest.mark.parametrize("name", [name for name in SAMPLES if not name.startswith("empty")])
def test_default_is_torchs_convolution(name):
    given = sample_of(name, torch.float32)
    actual = cuda_impl.run(*arguments(given))
    assert is_dense(actual, is_channels_last(given.kwargs["x"]))
    exact = resnet_block(**given.map_tensors(Tensor.double).kwargs, backend="reference")
    assert_contract(actual, exact, resnet_block(**given.kwargs, backend="reference"), given.relative_l2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_on_a_card(dtype, name):
    given = named(cases.samples("cuda", dtype), name)
    check_op(op, given, "cuda")
    launch, multiprocessors = cuda_runtime.launch, cuda_runtime.multiprocessors(given.kwargs["x"].device)
    first, second = (compute(given, launch, multiprocessors) for _ in range(2))
    plain = resnet_block(**given.kwargs, backend="reference")
    assert_contract(first, resnet_block(**given.map_tensors(Tensor.double).kwargs, backend="reference"), plain)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUTS)
def test_maps_that_end_inside_a_tile_on_a_card(name):
    given = cut(name).map_tensors(Tensor.cuda)
    plain = resnet_block(**given.kwargs, backend="reference")
    exact = resnet_block(**given.map_tensors(Tensor.double).kwargs, backend="reference")
    assert_contract(compute(given, cuda_runtime.launch, 1), exact, plain)
