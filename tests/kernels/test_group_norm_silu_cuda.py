"""group_norm_silu's CUDA kernels: on the host, thread by thread, and on a card."""

import functools
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastsd_kernels import group_norm_silu
from fastsd_kernels.group_norm_silu import cases, cuda_impl, op
from fastsd_kernels.testing import Sample, assert_contract, check_op, feature_map, named
from tests.harness import host

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SAMPLES = [sample.name for sample in cases.samples("cpu", torch.float32)]
# Elements of one size are accessed alike, so bfloat16 is left out
SANITIZED_SAMPLES = {
    torch.float16: (
        "contiguous",
        "channels_last_offset",
        "many_channels_channels_last",
        "vector_width_contiguous",
        "skip_contiguous_contiguous",
        "skip_channels_last_channels_last",
        "shared_channel_bias_channels_last",
    ),
    torch.float32: ("many_rows_contiguous", "off_vector_width_channels_last", "only_skip_channels_last"),
}
MULTIPROCESSORS = 132

SANITIZED = """
from tests.kernels import test_group_norm_silu_cuda as tests
wanted = [
    tests.named(tests.cases.samples("cpu", dtype), name)
    for dtype, names in tests.SANITIZED_SAMPLES.items()
    for name in names
]
tests.build_for(wanted)
for sample in wanted:
    tests.assert_right(sample)
print("right:", len(wanted))
"""

WITHOUT_CUDA = """
import sys
sys.modules["cuda"] = sys.modules["cuda.core"] = None
import torch
from fastsd_kernels.group_norm_silu import cuda_impl
print(cuda_impl.reject(torch.zeros(1, 4, 2), 2, None, None, 1e-5, "silu", None, None))
"""


@pytest.fixture
def poisoned_memory():
    """torch.empty comes full of NaN, so that what a kernel leaves out, or reads unwritten, shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def libraries():
    """All variants that the samples need, compiled side by side."""
    build_for(sample for dtype in DTYPES for sample in cases.samples("cpu", dtype))


def build_for(samples):
    variants = {}

    def note(source, kernel, defines, **launch):
        variants[source, defines] = None

    for sample in samples:
        compute(sample, note)
    host.build(variants)


def compute(sample, launch, multiprocessors=MULTIPROCESSORS):
    defaults = {"weight": None, "bias": None, "eps": 1e-5, "activation": "silu", "channel_bias": None, "skip": None}
    order = ("x", "num_groups", *defaults)
    return cuda_impl.compute(launch, multiprocessors, *((defaults | sample.kwargs)[name] for name in order))


def assert_right(sample, multiprocessors=MULTIPROCESSORS):
    """Within the contract, with the reference's strides, and the same bits in the opposite order of threads."""
    actual = compute(sample, host.launch, multiprocessors)
    assert actual.stride() == group_norm_silu(**sample.kwargs, backend="reference").stride()
    # torch's GroupNorm for channels-last maps on the CPU cancels for a large mean, in float64 too
    straight = sample.map_tensors(Tensor.contiguous)
    plain = group_norm_silu(**straight.kwargs, backend="reference")
    exact = group_norm_silu(**straight.map_tensors(Tensor.double).kwargs, backend="reference")
    assert_contract(actual, exact, plain)
    again = compute(sample, functools.partial(host.launch, seed=1), multiprocessors)
    torch.testing.assert_close(again, actual, rtol=0, atol=0, equal_nan=True)


def plan(**changes):
    """The plan of a map of 320 channels on 64 × 64 positions."""
    return cuda_impl.plan(
        **{
            "batch": 1,
            "x_channels": 320,
            "skip_channels": 0,
            "space": 64 * 64,
            "num_groups": 32,
            "channels_last": True,
            "dtype": torch.float16,
            "parameter_dtype": torch.float16,
            "alignment": 16,
            "multiprocessors": MULTIPROCESSORS,
        }
        | changes
    )


@pytest.mark.usefixtures("libraries", "poisoned_memory")
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(dtype, name):
    assert_right(named(cases.samples("cpu", dtype), name))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 4, 100, 99), 1),  # more splits than a warp has lanes
        ((2, 2100, 3), 1),  # a group in three pieces, the last one short
        ((1, 2064, 20), 2),  # pieces and chunks
        ((1, 150, 2), 150),  # tiles of several groups, the last one short
        ((1, 1023, 3), 3),  # a tile of more columns than threads
    ],
    ids=str,
)
def test_cuts(shape, groups, layout):
    like = {"device": "cpu", "dtype": torch.float32}
    x = feature_map(shape, layout, **like)
    weight, channel_bias = feature_map((shape[1],), "contiguous", **like), feature_map(shape[:2], "contiguous", **like)
    arguments = {"num_groups": groups, "weight": weight, "channel_bias": channel_bias}
    # partial means that differ, by little beside their size
    x = x + 10000 + torch.arange(shape[-1]) / shape[-1]
    assert_right(Sample("cut", {"x": x, **arguments}), multiprocessors=64)


def test_sanitized():
    """No access outside a tensor or outside shared memory, no misaligned one and no undefined arithmetic."""
    done = host.run_sanitized(SANITIZED)
    assert done.returncode == 0, done.stderr
    assert f"right: {sum(map(len, SANITIZED_SAMPLES.values()))}" in done.stdout


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plan_fills_the_card_with_16_byte_accesses(dtype, channels_last):
    for batch, channels, side in ((1, 320, 64), (2, 320, 64), (2, 960, 64), (2, 640, 32), (2, 1280, 16)):
        p = plan(batch=batch, x_channels=channels, space=side * side, dtype=dtype, channels_last=channels_last)
        assert f"VECTOR={16 // dtype.itemsize}" in p.defines
        assert math.prod(p.stats.grid) >= MULTIPROCESSORS


@pytest.mark.parametrize(
    ("changes", "vector"),
    [
        ({"alignment": 8}, 4),
        ({"alignment": 2}, 1),
        ({"x_channels": 316, "skip_channels": 4}, 4),
        ({"x_channels": 319, "skip_channels": 1}, 1),
        ({"space": 63 * 63}, 8),
        ({"space": 63 * 63, "channels_last": False}, 1),
        ({"x_channels": 319, "skip_channels": 1, "channels_last": False}, 8),
        ({"x_channels": 32 * 1000, "num_groups": 32}, 8),
        ({"x_channels": 32 * 999, "num_groups": 32}, 1),
    ],
    ids=str,
)
def test_plan_narrows_accesses_where_rows_are_not_aligned(changes, vector):
    assert f"VECTOR={vector}" in plan(**changes).defines


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 2**20, "space": 1},
        {"batch": 65537},
        {"space": 2**33},
        {"x_channels": 2**17, "num_groups": 1},
        {"x_channels": 2**17, "num_groups": 2**17},
    ],
    ids=str,
)
def test_plan_stays_within_the_limits_of_a_launch(changes, channels_last):
    p = plan(channels_last=channels_last, **changes)
    for launch in (p.stats, p.apply):
        assert launch.grid[0] < 2**31
        assert launch.grid[1:] == (1, 1)
        assert launch.block[0] % 32 == 0
        assert 0 < launch.shared_bytes <= 48 * 1024
    assert p.tile * p.chunk < 2**31


def test_rejections():
    rest = (4, None, None, 1e-5, "silu", None, None)
    assert cuda_impl.reject(torch.zeros(2, 8, 4), *rest) == "x is on cpu; the cuda backend needs CUDA tensors"
    with FakeTensorMode():
        for dtype in DTYPES:
            assert cuda_impl.reject(torch.empty(2, 8, 4, device="cuda", dtype=dtype), *rest) is None
        double = torch.empty(2, 8, 4, device="cuda", dtype=torch.float64)
        assert "x is torch.float64; the cuda backend takes" in cuda_impl.reject(double, *rest)
        rows = torch.empty(2**28, 8, 0, device="cuda")
        assert "268435456 samples of 8 channels" in cuda_impl.reject(rows, *rest)


def test_module_needs_no_cuda_package():
    done = subprocess.run([sys.executable, "-c", WITHOUT_CUDA], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "x is on cpu; the cuda backend needs CUDA tensors"


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_on_a_card(dtype, name):
    sample = named(cases.samples("cuda", dtype), name)
    check_op(op, sample, "cuda")
    first, second = (group_norm_silu(**sample.kwargs, backend="cuda") for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_batch_on_a_card(dtype):
    for sample in cases.large_samples("cuda", dtype):
        check_op(op, sample, "cuda")
