"""conv2d's CUDA kernels: on the host, thread by thread, and on a card."""

import functools
import itertools
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastsd_kernels import conv2d
from fastsd_kernels.conv2d import cases, composed, cuda_impl, measured, op
from fastsd_kernels.layout import is_channels_last, is_dense
from fastsd_kernels.testing import Sample, assert_contract, check_op, feature_map, named
from tests.harness import host

DEFAULTS: dict[str, Any] = {
    "bias": None,
    "stride": 1,
    "padding": 0,
    "skip": None,
    "num_groups": 0,
    "norm_weight": None,
    "norm_bias": None,
    "eps": 1e-5,
    "mean": None,
    "rstd": None,
    "activation": "none",
    "upsample_size": None,
    "channel_bias": None,
    "residual": None,
    "output_scale": 1.0,
    "algorithm": None,
}
FORCED = [s.name for s in cases.samples("cpu", torch.float32) if s.kwargs.get("algorithm") is None]
REFUSED = [
    s.name
    for s in cases.samples("cpu", torch.float32)
    if s.kwargs.get("algorithm") not in (None, "direct", "implicit_gemm")
]
DTYPES = (torch.float16, torch.bfloat16)
# Elements of one size are accessed alike, so bfloat16 is left out
SANITIZED_SAMPLES = (
    "everything_contiguous",
    "off_vector_width_channels_last",
    "one_channel_contiguous",
    "uneven_padding_channels_last",
    "stride_2_right_bottom_channels_last",
    "upsampled_everything_channels_last",
    "pointwise_everything_contiguous",
)
SANITIZED_CUTS = ("largest_tile", "splits_off_vector_width")
MULTIPROCESSORS = 132
SHARED_BYTES = 99 * 1024  # of the smallest cards from compute capability 8.0 on, for one block

SANITIZED = """
from tests.kernels import test_conv2d_cuda as tests
wanted = [*map(tests.sample_of, tests.SANITIZED_SAMPLES), *map(tests.cut, tests.SANITIZED_CUTS)]
tests.build_for(wanted)
for sample in wanted:
    tests.assert_right(sample)
print("right:", len(wanted))
"""

WITHOUT_CUDA = """
import sys
sys.modules["cuda"] = sys.modules["cuda.core"] = None
import torch
from fastsd_kernels.conv2d import cuda_impl
print(cuda_impl.reject(torch.zeros(1, 4, 2, 2), torch.zeros(4, 4, 1, 1), *[None] * 15, None))
"""


def _cut(
    shape: tuple[int, int, int, int],
    out_channels: int,
    kernel: int = 3,
    skip_channels: int = 0,
    stride: int = 1,
    dtype: torch.dtype = torch.float16,
) -> dict[str, Any]:
    """Arguments with a norm of the concatenation and a whole epilogue, channels last."""
    like: dict[str, Any] = {"device": "cpu", "dtype": dtype}
    batch, x_channels, height, width = shape
    channels, out_size = x_channels + skip_channels, (math.ceil(height / stride), math.ceil(width / stride))
    vector = functools.partial(feature_map, layout="contiguous", **like)
    return {
        "x": feature_map(shape, "channels_last", **like),
        "skip": feature_map((batch, skip_channels, height, width), "channels_last", **like) if skip_channels else None,
        "weight": vector((out_channels, channels, kernel, kernel)) * (channels * kernel * kernel) ** -0.5,
        "stride": stride,
        "padding": kernel // 2,
        "num_groups": 8,
        "norm_weight": vector((channels,)),
        "norm_bias": vector((channels,)),
        "activation": "silu",
        "bias": vector((out_channels,)),
        "channel_bias": vector((batch, out_channels)),
        "residual": feature_map((batch, out_channels, *out_size), "channels_last", **like),
        "output_scale": 0.75,
    }


# What the samples are too small for: arguments, the tile that they must get, the splits and a partial statistic's cut
CUTS = {
    "largest_tile": (((1, 40, 8, 16), 128), (8, 16, 128), 2),
    "largest_pointwise_tile": (((1, 40, 8, 16), 128, 1), (1, 128, 128), 1),
    "wide_tile": (((1, 16, 16, 16), 64), (8, 16, 64), 1),
    "small_map": (((1, 16, 8, 8), 128), (8, 8, 128), 1),
    "large_halo": (((1, 16, 16, 16), 72, 3, 0, 2), (8, 8, 16), 1),
    "splits": (((2, 72, 6, 5), 24, 3, 40), (8, 8, 32), 5),
    "splits_off_vector_width": (((1, 75, 6, 5), 6, 3, 45), (8, 8, 16), 5),
    "splits_bfloat16": (((1, 72, 6, 5), 24, 3, 40, 1, torch.bfloat16), (8, 8, 32), 5),
    "splits_pointwise": (((1, 520, 5, 5), 16, 1), (1, 32, 16), 2),
}


@pytest.fixture(scope="module")
def libraries():
    """All variants that the samples need, compiled side by side."""
    build_for([*(sample_of(name, dtype) for dtype in DTYPES for name in FORCED), *map(cut, CUTS)])


def sample_of(name, dtype=torch.float16):
    return named(cases.samples("cpu", dtype), name)


def cut(name):
    return Sample(name, _cut(*CUTS[name][0]))


def build_for(samples):
    host.build({(launch["source"], launch["defines"]): None for sample in samples for launch in launches_of(sample)})


def launches_of(sample, multiprocessors=MULTIPROCESSORS):
    noted = []

    def note(source, kernel, defines, **launch):
        noted.append({"source": source, "kernel": kernel, "defines": defines, **launch})

    compute(sample, note, multiprocessors)
    return noted


def arguments(sample):
    given = DEFAULTS | sample.kwargs
    if isinstance(given["padding"], int):
        given["padding"] = [given["padding"]] * 4
    return [given[name] for name in ("x", "weight", *DEFAULTS)]


def compute(sample, launch, multiprocessors=MULTIPROCESSORS):
    return cuda_impl.compute(launch, multiprocessors, *arguments(sample)[:-1])


def assert_right(sample, multiprocessors=MULTIPROCESSORS):
    """Within the contract, dense in x's layout, and the same bits in the opposite order of threads."""
    actual = compute(sample, host.launch, multiprocessors)
    assert is_dense(actual, is_channels_last(sample.kwargs["x"]))
    plain = conv2d(**sample.kwargs, backend="reference")
    exact = conv2d(**sample.map_tensors(Tensor.double).kwargs, backend="reference")
    assert_contract(actual, exact, plain)
    again = compute(sample, functools.partial(host.launch, seed=1), multiprocessors)
    torch.testing.assert_close(again, actual, rtol=0, atol=0, equal_nan=True)


def plan(**changes):
    """The plan of a convolution of 320 channels on 64 × 64 positions."""
    return cuda_impl.plan(
        **{
            "batch": 2,
            "x_channels": 320,
            "skip_channels": 0,
            "num_groups": 32,
            "kernel": 3,
            "stride": 1,
            "out_channels": 320,
            "out_height": 64,
            "out_width": 64,
            "dtype": torch.float16,
            "parameter_dtype": torch.float16,
            "alignment": 16,
            "out_alignment": 16,
            "multiprocessors": MULTIPROCESSORS,
        }
        | changes
    )


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", FORCED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(dtype, name):
    assert_right(sample_of(name, dtype))


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", CUTS)
def test_cuts(name):
    _, (height, width, channels), splits = CUTS[name]
    sample = cut(name)
    convolve = next(launch for launch in launches_of(sample) if launch["kernel"] == "conv2d_implicit_gemm")
    assert {f"TILE_H={height}", f"TILE_W={width}", f"TILE_K={channels}"} <= set(convolve["defines"])
    assert len(launches_of(sample)) == (4 if splits > 1 else 3)
    workspace = convolve["args"][8]
    assert (1 if workspace is None else workspace.shape[0]) == splits
    assert_right(sample)


@pytest.mark.usefixtures("libraries")
def test_one_split_needs_no_workspace():
    sample = cut("splits")
    assert [launch["kernel"] for launch in launches_of(sample, multiprocessors=1)] == [
        "group_norm_silu_stats",
        "conv2d_coefficients",
        "conv2d_implicit_gemm",
    ]
    assert_right(sample, multiprocessors=1)


def test_statistics_in_several_parts():
    """Partial means that differ by little beside their size, more of them than a warp has lanes."""
    given = _cut((1, 8, 48, 48), 8, 1) | {"num_groups": 1}
    x = given["x"].float() / 8 + torch.arange(48)[:, None] / 6 + 100
    sample = Sample("parts", given | {"x": x.half()})
    statistics = launches_of(sample)[0]
    assert statistics["args"][-1] > 8
    assert_right(sample)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (9, 5), (10, 12), (19, 31), (23, 18), (41, 37)], ids=str)
def test_nearest_is_torchs(size):
    x = torch.arange(8 * 5 * 6, dtype=torch.float16).view(1, 8, 5, 6)
    sample = Sample("nearest", {"x": x, "weight": torch.eye(8).half()[..., None, None], "upsample_size": size})
    expected = F.interpolate(x, size=size, mode="nearest")
    torch.testing.assert_close(compute(sample, host.launch), expected, rtol=0, atol=0)


def test_padding_around_nothing():
    x, bias = torch.empty(2, 8, 0, 4).half(), torch.arange(8).half()
    y = compute(
        Sample("nothing", {"x": x, "weight": torch.ones(8, 8, 1, 1).half(), "bias": bias, "padding": 1}), host.launch
    )
    assert torch.equal(y, bias[:, None, None].expand(2, 8, 2, 6))


def test_sanitized():
    """No access outside a tensor or outside shared memory, no misaligned one and no undefined arithmetic."""
    done = host.run_sanitized(SANITIZED)
    assert done.returncode == 0, done.stderr
    assert f"right: {len(SANITIZED_SAMPLES) + len(SANITIZED_CUTS)}" in done.stdout


def test_channels_last_weights_are_not_copied():
    weight = torch.randn(8, 24, 3, 3).half().contiguous(memory_format=torch.channels_last)
    packed = cuda_impl._packed(weight, 16)
    assert packed.shape == (8, 9, 24)
    assert packed.data_ptr() == weight.data_ptr()
    assert torch.equal(packed.view(8, 3, 3, 24), weight.permute(0, 2, 3, 1))


def test_weights_are_padded_for_x_and_for_skip():
    weight = torch.randn(8, 15, 3, 3).half()
    packed = cuda_impl._packed(weight, 11)
    assert packed.shape == (8, 9, 24)
    rows = weight.flatten(2).movedim(1, 2)
    assert torch.equal(packed[..., :11], rows[..., :11])
    assert torch.equal(packed[..., 16:20], rows[..., 11:])
    assert not packed[..., 11:16].any()
    assert not packed[..., 20:].any()


# Stable Diffusion 1.5 at 512²: input channels, those of skip, output channels, side
STAGES = [(320, 0, 320, 64), (640, 320, 640, 32), (1280, 640, 1280, 16), (1280, 1280, 1280, 8), (1280, 0, 1280, 8)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("x_channels", "skip_channels", "out_channels", "side"), STAGES)
def test_plan_fills_the_card_with_16_byte_accesses(x_channels, skip_channels, out_channels, side, batch):
    size = {"out_height": side, "out_width": side}
    channels = {"x_channels": x_channels, "skip_channels": skip_channels, "out_channels": out_channels}
    p = plan(batch=batch, **channels, **size)
    assert {"VECTOR=8", "OUT_VECTOR=8", "STEP=32"} <= set(p.defines)
    assert p.convolve.grid[0] >= MULTIPROCESSORS
    # no block of zeros beyond the result, and none that is mostly zeros
    tile = cuda_impl.tile_for(1, out_channels, side, side)
    assert tile.height * tile.width * tile.channels * p.convolve.grid[0] == batch * side**2 * out_channels * p.splits


@pytest.mark.parametrize(
    ("changes", "defines"),
    [
        ({"alignment": 8}, ("VECTOR=4", "OUT_VECTOR=8")),
        ({"out_alignment": 2}, ("VECTOR=8", "OUT_VECTOR=1")),
        ({"x_channels": 316, "skip_channels": 4}, ("VECTOR=4",)),
        ({"x_channels": 320, "skip_channels": 30}, ("VECTOR=2",)),
        ({"x_channels": 319}, ("VECTOR=1",)),
        ({"x_channels": 4}, ("VECTOR=4", "STEP=16")),
        ({"out_channels": 4}, ("OUT_VECTOR=4", "TILE_K=16")),
    ],
    ids=str,
)
def test_plan_narrows_accesses_where_rows_are_not_aligned(changes, defines):
    assert set(defines) <= set(plan(**changes).defines)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 65537, "out_height": 2, "out_width": 2},
        {"batch": 65537},
        {"batch": 1, "out_height": 1, "out_width": 2**30},
        {"batch": 1, "out_height": 2**20, "out_width": 2**3},
        {"batch": 1, "out_channels": 2**20, "x_channels": 2**20},
        {"batch": 1, "out_channels": 1, "out_height": 1, "out_width": 1},
        {"multiprocessors": 1},
        {"multiprocessors": 10**5, "x_channels": 2**20},
    ],
    ids=str,
)
def test_plan_stays_within_the_limits_of_a_launch(changes, kernel, stride):
    p = plan(**changes, kernel=kernel, stride=stride)
    for launch in (p.coefficients, p.convolve, p.reduce):
        assert 0 < launch.grid[0] < 2**31
        assert launch.grid[1:] == (1, 1)
        assert launch.block[0] in (32, 64, 128, 256)
        assert launch.shared_bytes <= SHARED_BYTES
    assert 1 <= p.splits <= 16


def test_every_tile_is_of_whole_warps():
    sizes = (1, 2, 7, 8, 9, 16, 33, 64)
    for height, width, channels, stride in itertools.product(sizes, sizes, (1, 17, 40, 64, 640), (1, 2)):
        tile = cuda_impl.tile_for(stride, channels, height, width)
        assert tile.channels % tile.warp_channels == 0
        assert tile.height * tile.width % 32 == 0
        assert 32 <= tile.threads <= 256


@pytest.mark.parametrize("name", REFUSED)
def test_other_algorithms_are_refused(name):
    sample = sample_of(name)
    with FakeTensorMode():
        refusal = cuda_impl.reject(*arguments(sample.map_tensors(lambda t: torch.empty(t.shape, device="cuda"))))
    algorithm = sample.kwargs["algorithm"]
    assert refusal == f"algorithm is {algorithm!r}; the cuda backend has 'direct' and 'implicit_gemm'"


def test_rejections():
    def reject(device="cuda", dtype=torch.float16, batch=2, size=4, **changes):
        x = torch.empty(batch, 8, size, size, device=device, dtype=dtype)
        weight = torch.empty(8, 8, 3, 3, device=device, dtype=dtype)
        return cuda_impl.reject(*arguments(Sample("refused", {"x": x, "weight": weight, "padding": 1} | changes)))

    assert reject("cpu") == "x is on cpu; the cuda backend needs CUDA tensors"
    with FakeTensorMode():
        for dtype in DTYPES:
            assert reject(dtype=dtype, algorithm="implicit_gemm") is None
        for dtype in (torch.float32, torch.float64):
            says = f"x is {dtype}; implicit_gemm takes float16 and bfloat16"
            assert reject(dtype=dtype, algorithm="implicit_gemm").startswith(says)
            for algorithm in (None, "direct"):
                assert reject(dtype=dtype, algorithm=algorithm) is None
        assert reject(batch=0, algorithm="implicit_gemm") is None
        assert "x has 536870912 samples" in reject(batch=2**29, algorithm="implicit_gemm")


@pytest.mark.parametrize("algorithm", [None, "direct"])
def test_default_is_torchs_convolution(algorithm):
    sample = sample_of("everything_channels_last")
    sample = replace(sample, kwargs=sample.kwargs | {"algorithm": algorithm})
    expected = composed.run(*arguments(sample)[:-1])
    torch.testing.assert_close(cuda_impl.run(*arguments(sample)), expected, rtol=0, atol=0)


def test_measurements_decide(monkeypatch):
    sample = sample_of("stride_2_channels_last")  # 8 to 16 channels, 9 × 8 to 5 × 4
    monkeypatch.setattr(cuda_impl, "compute", lambda *args: "implicit_gemm")
    monkeypatch.setattr(cuda_impl.composed, "run", lambda *args: "direct")
    monkeypatch.setattr(cuda_impl.cuda_runtime, "multiprocessors", lambda device: MULTIPROCESSORS)
    for fastest in ("direct", "implicit_gemm", "triton 64x64"):
        with measured.forced(fastest):
            expected = "implicit_gemm" if fastest == "implicit_gemm" else "direct"
            assert cuda_impl.run(*arguments(sample)) == expected
            assert cuda_impl.run(*arguments(sample.map_tensors(Tensor.float))) == "direct"
            assert cuda_impl.run(*arguments(sample)[:-1], "direct") == "direct"


def test_module_needs_no_cuda_package():
    done = subprocess.run([sys.executable, "-c", WITHOUT_CUDA], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "x is on cpu; the cuda backend needs CUDA tensors"


@pytest.mark.gpu
@pytest.mark.parametrize("name", [sample.name for sample in cases.samples("cpu", torch.float32)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_on_a_card(dtype, name):
    sample = named(cases.samples("cuda", dtype), name)
    algorithm = sample.kwargs.get("algorithm")
    if name in REFUSED:
        pytest.skip(f"the cuda backend has no {algorithm}")
    sample = replace(sample, kwargs=sample.kwargs | {"algorithm": algorithm or "implicit_gemm"})
    check_op(op, sample, "cuda")
    first, second = (conv2d(**sample.kwargs, backend="cuda") for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUTS)
def test_cuts_on_a_card(name):
    sample = cut(name).map_tensors(Tensor.cuda)
    check_op(op, replace(sample, kwargs=sample.kwargs | {"algorithm": "implicit_gemm"}), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_batch_on_a_card(dtype):
    for sample in cases.large_samples("cuda", dtype):
        check_op(op, replace(sample, kwargs=sample.kwargs | {"algorithm": "implicit_gemm"}), "cuda")
