"""linear's CUDA kernels: on the host, thread by thread, and on a card."""

import functools
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastsd_kernels import linear
from fastsd_kernels.linear import cases, cuda_impl, op
from fastsd_kernels.testing import Sample, assert_contract, check_op, named
from fastsd_kernels.testing.inputs import random_tensor
from tests.harness import host

DEFAULTS: dict[str, Any] = {
    "bias": None,
    "norm_weight": None,
    "norm_bias": None,
    "norm_eps": None,
    "activation": "none",
    "residual": None,
}
NAMES = [sample.name for sample in cases.samples("cpu", torch.float32)]
DTYPES = (torch.float16, torch.bfloat16)
# Elements of one size are accessed alike, so bfloat16 is left out
SANITIZED_SAMPLES = (
    "everything_contiguous",
    "everything_packed",
    "everything_sliced_width",
    "everything_strided_width",
    "everything_expanded_heads",
    "everything_storage_offset",
    "one_feature_geglu",
    "off_vector_width_quick_gelu",
    "wide_geglu",
    "mixed_dtypes",
    "weight_sliced",
    "weight_rows_apart",
    "weight_off_alignment",
)
SANITIZED_CUTS = ("largest_tile", "largest_gated_tile", "single_elements", "misaligned_norm")
MULTIPROCESSORS = 132
SHARED_BYTES = 99 * 1024  # of the smallest cards from compute capability 8.0 on, for one block

SANITIZED = """
from tests.kernels import test_linear_cuda as tests
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
from fastsd_kernels.linear import cuda_impl
x = torch.zeros(4, 8)
print(cuda_impl.reject(x, x, None, None, None, None, "none", None))
"""

# What the samples are too small for: rows, width, rows of the weight, activation; the grid and how the plan must cut it
CUTS: dict[str, tuple[int, int, int, str, int, tuple[str, ...]]] = {
    "largest_tile": (250, 72, 248, "none", 4, ("TILE_ROWS=128", "TILE_FEATURES=128", "WARP_FEATURES=64")),
    "largest_gated_tile": (120, 104, 240, "geglu", 2, ("TILE_ROWS=128", "TILE_FEATURES=64", "WARP_FEATURES=32")),
    "high_tile": (250, 64, 60, "gelu", 2, ("TILE_ROWS=128", "TILE_FEATURES=64", "WARP_FEATURES=32")),
    "square_tile": (60, 200, 120, "quick_gelu", 2, ("TILE_ROWS=64", "TILE_FEATURES=64")),
    "wide_gated_tile": (30, 136, 120, "geglu", 2, ("TILE_ROWS=32", "TILE_FEATURES=32")),
    "small_tile": (30, 328, 90, "none", 3, ("TILE_ROWS=32", "TILE_FEATURES=32", "OUT_VECTOR=2")),
    "smallest_tile": (70, 96, 40, "gelu", 9, ("TILE_ROWS=32", "TILE_FEATURES=16", "OUT_VECTOR=8")),
    "smallest_gated_tile": (70, 96, 80, "geglu", 15, ("TILE_ROWS=32", "TILE_FEATURES=8", "OUT_VECTOR=8")),
    "single_elements": (90, 75, 66, "geglu", 15, ("VECTOR=1", "OUT_VECTOR=1", "STEP=32")),
    "short_rows": (90, 12, 66, "geglu", 15, ("VECTOR=4", "STEP=16")),
    "misaligned_norm": (40, 40, 24, "none", 2, ("VECTOR=8",)),
}


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
    build_for([*(sample_of(name, dtype) for dtype in DTYPES for name in NAMES), *map(cut, CUTS)])


@pytest.fixture(scope="module")
def libraries_for_a_large_card():
    build_for([sample_of(name, dtype) for dtype in DTYPES for name in planned_otherwise()], MULTIPROCESSORS)


def sample_of(name, dtype=torch.float16):
    return named(cases.samples("cpu", dtype), name)


def cut(name, dtype=torch.float16):
    rows, width, weights, activation, *_ = CUTS[name]
    like: dict[str, Any] = {"device": "cpu", "dtype": dtype}
    features = weights // 2 if activation == "geglu" else weights
    first = 1 if name == "misaligned_norm" else 0
    given = {
        "x": random_tensor((rows, width), **like) * 2 + 3,
        "weight": random_tensor((weights, width), **like, seed=5) * width**-0.5,
        "bias": random_tensor((weights,), **like, seed=6),
        "norm_weight": random_tensor((width + first,), **like, seed=1)[first:],
        "norm_bias": random_tensor((width + first,), **like, seed=2)[first:],
        "norm_eps": 1e-5,
        "activation": activation,
        "residual": random_tensor((rows, features), **like, seed=8),
    }
    return Sample(name, given)


def build_for(samples, multiprocessors=1):
    launches = (launch for sample in samples for launch in launches_of(sample, multiprocessors))
    host.build({(launch["source"], launch["defines"]): None for launch in launches})


def launches_of(sample, multiprocessors=1):
    noted = []

    def note(source, kernel, defines, **launch):
        noted.append({"source": source, "kernel": kernel, "defines": defines, **launch})

    compute(sample, note, multiprocessors)
    return noted


def compute(sample, launch, multiprocessors=1):
    given = DEFAULTS | sample.kwargs
    return cuda_impl.compute(launch, multiprocessors, *(given[name] for name in ("x", "weight", *DEFAULTS)))


@functools.cache
def planned_otherwise():
    """The samples that a card of MULTIPROCESSORS cuts otherwise than one that has a single one."""
    return [name for name in NAMES if planned(name, MULTIPROCESSORS) != planned(name, 1)]


def planned(name, multiprocessors):
    return [launch["defines"] for launch in launches_of(sample_of(name), multiprocessors)]


def assert_right(sample, multiprocessors=1):
    """Within the contract, with the reference's strides, and the same bits in the opposite order of threads."""
    actual = compute(sample, host.launch, multiprocessors)
    plain = linear(**sample.kwargs, backend="reference")
    exact = linear(**sample.map_tensors(Tensor.double).kwargs, backend="reference")
    assert actual.stride() == plain.stride()
    assert_contract(actual, exact, plain)
    again = compute(sample, functools.partial(host.launch, seed=1), multiprocessors)
    torch.testing.assert_close(again, actual, rtol=0, atol=0, equal_nan=True)


def plan(**changes):
    """The plan of the first projection of Stable Diffusion 1.5's largest map at 512²."""
    return cuda_impl.plan(
        **{
            "rows": 8192,
            "width": 320,
            "features": 320,
            "gated": False,
            "dtype": torch.float16,
            "parameter_dtype": torch.float16,
            "alignment": 16,
            "out_alignment": 16,
            "multiprocessors": MULTIPROCESSORS,
        }
        | changes
    )


@pytest.mark.usefixtures("libraries", "poisoned_memory")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(dtype, name):
    assert_right(sample_of(name, dtype))


@pytest.mark.usefixtures("libraries", "poisoned_memory")
@pytest.mark.parametrize("name", CUTS)
def test_cuts(name):
    *_, blocks, defines = CUTS[name]
    sample = cut(name)
    _, project = launches_of(sample)
    assert project["grid"] == (blocks, 1, 1)
    assert set(defines) <= set(project["defines"])
    assert_right(sample)


@pytest.mark.usefixtures("libraries_for_a_large_card", "poisoned_memory")
@pytest.mark.parametrize("name", planned_otherwise())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_tiles_for_a_large_card(dtype, name):
    sample = sample_of(name, dtype)
    assert "TILE_ROWS=32" in launches_of(sample, MULTIPROCESSORS)[-1]["defines"]
    assert_right(sample, MULTIPROCESSORS)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("of", ["x", "weight", "bias", "norm_weight", "norm_bias", "residual"])
def test_values_that_are_not_finite(of, value):
    sample = cut("smallest_gated_tile")
    sample.kwargs[of].view(-1)[17] = value
    assert_right(sample)


@pytest.mark.usefixtures("libraries")
def test_product_of_whole_numbers_is_exact():
    """Every element of a weight that is a permutation, and every row, is where it belongs."""
    x = (torch.arange(250)[:, None] * 3 + torch.arange(72)[None]).half()
    order = torch.randperm(72, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(248, 72).half()
    weight[torch.arange(0, 216, 3), order] = 1.0
    sample = Sample("permutation", {"x": x, "weight": weight})
    assert "TILE_FEATURES=128" in launches_of(sample)[0]["defines"]
    assert torch.equal(compute(sample, host.launch), x @ weight.t())


@pytest.mark.usefixtures("libraries")
def test_rows_are_read_where_they_are():
    sample = sample_of("everything_packed")
    moments, project = launches_of(sample)
    x, weight, *_, residual, _ = project["args"][:8]
    for given, name in ((moments["args"][0], "x"), (x, "x"), (weight, "weight"), (residual, "residual")):
        assert given.data_ptr() == sample.kwargs[name].data_ptr()
    assert "VECTOR=8" in project["defines"]
    assert project["args"][11] == sample.kwargs["x"].stride(1) == 72


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("everything_contiguous", ["linear_moments", "linear_project"]),
        ("bare_norm", ["linear_moments", "linear_project"]),
        ("plain_contiguous", ["linear_project"]),
        ("no_rows_geglu", []),
        ("empty_batch_bare", []),
    ],
)
def test_only_what_is_needed_is_launched(name, kernels):
    assert [launch["kernel"] for launch in launches_of(sample_of(name))] == kernels


def test_sanitized():
    """No access outside a tensor or outside shared memory, no misaligned one and no undefined arithmetic."""
    done = host.run_sanitized(SANITIZED)
    assert done.returncode == 0, done.stderr
    assert f"right: {len(SANITIZED_SAMPLES) + len(SANITIZED_CUTS)}" in done.stdout


# Stable Diffusion 1.5 at 512²: positions of a sample, width, features, whether there are gates
STAGES = [
    (positions, *product)
    for positions, channels in ((4096, 320), (1024, 640), (256, 1280))
    for product in (
        (channels, channels, False),
        (channels, 4 * channels, True),
        (4 * channels, channels, False),
    )
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("positions", "width", "features", "gated"), STAGES)
def test_plan_fills_the_card_with_16_byte_accesses(positions, width, features, gated, batch, dtype):
    p = plan(rows=batch * positions, width=width, features=features, gated=gated, dtype=dtype)
    assert {"VECTOR=8", "OUT_VECTOR=8", "STEP=32"} <= set(p.defines)
    assert p.project.grid[0] >= MULTIPROCESSORS
    # no block of zeros beyond the result, and none that is partly zeros
    tile = cuda_impl.tile_for(batch * positions, features * (1 + gated), MULTIPROCESSORS)
    assert tile.rows * tile.weights * p.project.grid[0] == batch * positions * features * (1 + gated)


@pytest.mark.parametrize(
    ("changes", "defines"),
    [
        ({}, ("VECTOR=8", "OUT_VECTOR=8")),
        ({"alignment": 8}, ("VECTOR=4", "OUT_VECTOR=8")),
        ({"alignment": 2}, ("VECTOR=1", "OUT_VECTOR=8")),
        ({"out_alignment": 4}, ("VECTOR=8", "OUT_VECTOR=2")),
        ({"width": 324}, ("VECTOR=4", "OUT_VECTOR=8")),
        ({"width": 6}, ("VECTOR=2", "STEP=16")),
        ({"features": 75}, ("VECTOR=8", "OUT_VECTOR=1")),
        ({"features": 20, "gated": True}, ("VECTOR=8", "OUT_VECTOR=4")),
    ],
    ids=str,
)
def test_plan_narrows_accesses_where_rows_are_not_aligned(changes, defines):
    assert set(defines) <= set(plan(**changes).defines)


@pytest.mark.parametrize(
    ("name", "vector", "out_vector"),
    [
        ("everything_contiguous", 8, 4),
        ("everything_packed", 8, 4),
        ("everything_sliced_width", 1, 1),
        ("everything_strided_width", 8, 4),  # copied
        ("everything_storage_offset", 1, 1),
        ("weight_off_alignment", 1, 4),
        ("weight_sliced", 1, 4),
        ("weight_rows_apart", 8, 4),
        ("weight_transposed", 8, 4),  # copied
    ],
)
def test_strides_and_addresses_count(name, vector, out_vector):
    defines = launches_of(sample_of(name))[-1]["defines"]
    assert {f"VECTOR={vector}", f"OUT_VECTOR={out_vector}"} <= set(defines)


def test_parameters_have_one_dtype_and_whole_vectors():
    _, project = launches_of(cut("misaligned_norm"))
    assert all(p.data_ptr() % 16 == 0 and p.dtype == torch.float16 for p in project["args"][3:5])
    mixed = cut("misaligned_norm")
    mixed.kwargs["bias"] = mixed.kwargs["bias"].double()
    _, project = launches_of(mixed)
    assert all(p.dtype == torch.float32 for p in project["args"][3:6])
    assert "PARAMETER_DTYPE=float" in project["defines"]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 2**31},
        {"rows": 2**31, "features": 1},
        {"rows": 1, "features": 2**29},
        {"rows": 1, "features": 1, "width": 2**30},
        {"rows": 1, "features": 1, "width": 1},
        {"multiprocessors": 1},
        {"multiprocessors": 10**5},
    ],
    ids=str,
)
def test_plan_stays_within_the_limits_of_a_launch(changes, gated):
    p = plan(**changes, gated=gated)
    for launch in (p.moments, p.project):
        assert 0 < launch.grid[0] < 2**31
        assert launch.grid[1:] == (1, 1)
        assert launch.block[0] in (32, 64, 128, 256)
        assert launch.shared_bytes <= SHARED_BYTES


def test_no_plan_asks_for_more_blocks_than_a_refusal_counts():
    sizes = (1, 2, 16, 17, 31, 33, 64, 100, 154, 1280, 8192)
    for rows, weights, multiprocessors in itertools.product(sizes, sizes, (1, MULTIPROCESSORS)):
        tile = cuda_impl.tile_for(rows, weights, multiprocessors)
        assert tile.count(rows, weights) <= cuda_impl._TILES[-1].count(rows, weights)


def test_rejections():
    def reject(device="cuda", dtype=torch.float16, x=(2, 3, 8), weights=6):
        x = torch.empty(x, device=device, dtype=dtype)
        return cuda_impl.reject(x, x.new_empty(weights, x.shape[-1]), *DEFAULTS.values())

    assert reject("cpu") == "x is on cpu; the cuda backend needs CUDA tensors"
    with FakeTensorMode():
        for dtype in DTYPES:
            assert reject(dtype=dtype) is None
            assert reject(dtype=dtype, x=(0, 8)) is None
            assert reject(dtype=dtype, x=(8,)) is None
        for dtype in (torch.float32, torch.float64):
            assert reject(dtype=dtype).startswith(
                f"x is {dtype}; the cuda backend takes float16 and bfloat16; backend="
            )
        assert reject(x=(1, 2**30)) is None
        assert reject(x=(1, 2**30 + 1)).startswith("weight is 6 by 1073741825; the cuda backend takes up to 1073741824")
        assert reject(weights=2**30) is None
        assert reject(weights=2**30 + 1).startswith("weight is 1073741825 by 8; the cuda backend takes up to")
        assert reject(x=(2**31, 8), weights=256) is None
        assert "x has 2147483648 rows for 512 of the weight, which take 2147483648 blocks" in reject(
            x=(2**31, 8), weights=512
        )
        assert "which take 2147483648 blocks" in reject(x=(2**34, 8), weights=1)


def test_module_needs_no_cuda_package():
    done = subprocess.run([sys.executable, "-c", WITHOUT_CUDA], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "x is on cpu; the cuda backend needs CUDA tensors"


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_on_a_card(dtype, name):
    sample = named(cases.samples("cuda", dtype), name)
    check_op(op, sample, "cuda")
    first, second = (linear(**sample.kwargs, backend="cuda") for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuts_on_a_card(dtype, name):
    check_op(op, cut(name, dtype).map_tensors(Tensor.cuda), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_batch_on_a_card(dtype):
    for sample in cases.large_samples("cuda", dtype):
        check_op(op, sample, "cuda")
