"""gri_attention's CUDA kernels: on the host, thread by thread, and on a card."""

import functools
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastsd_kernels import gri_attention
from fastsd_kernels.attention.cuda_impl import MAX_WIDTH
from fastsd_kernels.gri_attention import cases, cuda_impl, op
from fastsd_kernels.testing import Sample, assert_contract, check_op, named
from fastsd_kernels.testing.inputs import random_tensor
from tests.harness import host

DEFAULTS: dict[str, Any] = {"interaction": "joint", "mask_own_window": False, "gate": None, "scale": None}
NAMES = [sample.name for sample in cases.samples("cpu", torch.float32)]
DTYPES = (torch.float16, torch.bfloat16)
# Elements of one size are accessed alike, so bfloat16 is left out
SANITIZED_SAMPLES = (
    "contiguous",
    "packed",
    "sliced_width",
    "storage_offset",
    "width_40",
    "width_33",
    "ragged_masked",
    "ragged_gated_masked",
    "oblong_agent",
    "only_regions",
    "only_cells",
    "one_token",
)
SANITIZED_CUTS = ("several_query_tiles", "wide_gated", "quarter_pieces")
MULTIPROCESSORS = 132
SHARED_BYTES = 99 * 1024  # of the smallest cards from compute capability 8.0 on, for one block

SANITIZED = """
from tests.kernels import test_gri_attention_cuda as tests
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
from fastsd_kernels.gri_attention import cuda_impl
q = torch.zeros(1, 2, 4, 8)
print(cuda_impl.reject(q, q, q, (2, 2), (1, 1), None, "joint", False, None, None))
"""

# What the samples are too small for: map, window, pool, width, what else is given, and how the plan must cut it
CUTS: dict[str, tuple[tuple[int, int], Any, Any, int, dict[str, Any], tuple[str, ...]]] = {
    # the windows at the edges have fewer tiles than the grid has blocks for
    "several_query_tiles": ((12, 20), (10, 16), 3, 40, {}, ("WARPS=4", "KEYS=64", "VECTOR=8")),
    "two_warps": ((4, 16), (4, 8), 2, 64, {"layout": "packed"}, ("WARPS=2", "KEYS=64", "VECTOR=8")),
    "tiles_of_runs": ((9, 15), None, 3, 80, {"layout": "token_major"}, ("WARPS=4", "KEYS=64")),
    "wide": ((8, 12), (8, 8), 4, 160, {}, ("WARPS=4", "KEYS=32")),
    # what the regions leave in shared memory has no room with four warps
    "wide_gated": ((8, 12), (8, 8), 4, 160, {"interaction": "gated"}, ("WARPS=2", "KEYS=32")),
    "widest": ((8, 9), (8, 8), 4, 256, {}, ("WARPS=4", "KEYS=16")),
    "widest_gated": ((8, 9), (8, 8), 4, 256, {"interaction": "gated"}, ("WARPS=2", "KEYS=16")),
    "quarter_pieces": ((8, 9), 8, 3, 100, {"layout": "token_major"}, ("WARPS=4", "KEYS=32", "VECTOR=4")),
    "pairs": ((8, 9), 8, 3, 6, {}, ("WARPS=4", "KEYS=64", "VECTOR=2")),
    "agent": ((12, 12), 8, 2, 64, {"interaction": "agent", "layout": "token_major"}, ("WARPS=4",)),
    # the softmax begins with a tile of which nothing counts
    "first_cells_left_out": (
        (12, 16), (8, 16), 1, 8, {"interaction": "gated", "mask_own_window": True}, ("WARPS=4",),
    ),
    "first_and_last_cells_left_out": ((20, 16), (8, 16), 1, 8, {"mask_own_window": True}, ("WARPS=4",)),
    "wide_pool": ((16, 24), 4, (16, 11), 8, {"heads": 1}, ("WARPS=1",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def libraries():
    """All variants that the samples need, compiled side by side."""
    build_for([*(sample_of(name, dtype) for dtype in DTYPES for name in NAMES), *map(cut, CUTS)])


def sample_of(name, dtype=torch.float16):
    return named(cases.samples("cpu", dtype), name)


def cut(name, dtype=torch.float16):
    grid, window, pool, width, given, _ = CUTS[name]
    given = {"heads": 2, "layout": "contiguous"} | given
    like: dict[str, Any] = {"device": "cpu", "dtype": dtype}
    heads, layout = given.pop("heads"), given.pop("layout")
    q, k, v = cases.tokens(1, heads, grid[0] * grid[1], width, layout, **like)
    if given.get("interaction") == "gated":
        given["gate"] = random_tensor((heads,), **like, seed=9)
    return Sample(name, {"q": q, "k": k, "v": v, "grid": grid, "window": window, "pool": pool} | given)


def build_for(samples):
    host.build({(launch["source"], launch["defines"]): None for sample in samples for launch in launches_of(sample)})


def launches_of(sample, multiprocessors=1):
    noted = []

    def note(source, kernel, defines, **launch):
        noted.append({"source": source, "kernel": kernel, "defines": defines, **launch})

    compute(sample, note, multiprocessors)
    return noted


def arguments(sample):
    given = DEFAULTS | sample.kwargs
    for size in ("window", "pool"):
        if isinstance(given[size], int):
            given[size] = [given[size]] * 2
    return [given[name] for name in ("q", "k", "v", "grid", "window", "pool", *DEFAULTS)]


def compute(sample, launch, multiprocessors=1):
    return cuda_impl.compute(launch, multiprocessors, *arguments(sample))


def assert_right(sample, multiprocessors=1):
    """Within the contract, with the reference's strides, and the same bits in the opposite order of threads."""
    actual = compute(sample, host.launch, multiprocessors)
    plain = gri_attention(**sample.kwargs, backend="reference")
    exact = gri_attention(**sample.map_tensors(Tensor.double).kwargs, backend="reference")
    assert actual.stride() == plain.stride()
    assert_contract(actual, exact, plain)
    again = compute(sample, functools.partial(host.launch, seed=1), multiprocessors)
    torch.testing.assert_close(again, actual, rtol=0, atol=0, equal_nan=True)


def plan(**changes):
    """The plan of Stable Diffusion 1.5's largest map at 512²."""
    return cuda_impl.plan(
        **{
            "batch": 2,
            "heads": 8,
            "width": 40,
            "grid": (64, 64),
            "window": (16, 16),
            "pool": (4, 4),
            "gated": False,
            "dtype": torch.float16,
            "alignment": 16,
            "multiprocessors": MULTIPROCESSORS,
        }
        | changes
    )


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(dtype, name):
    assert_right(sample_of(name, dtype))


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", CUTS)
def test_cuts(name):
    sample = cut(name)
    *_, defines = CUTS[name]
    assert set(defines) <= set(launches_of(sample)[-1]["defines"])
    assert_right(sample)


@pytest.mark.parametrize("name", ["ragged_gated_masked", "many_keys"])
def test_small_blocks_for_a_large_card(name):
    sample = sample_of(name)
    *_, attend = launches_of(sample, MULTIPROCESSORS)
    assert "WARPS=1" in attend["defines"]
    assert_right(sample, MULTIPROCESSORS)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["contiguous", "ragged_gated"])
def test_queries_that_are_not_finite(name, value):
    sample = sample_of(name)
    sample.kwargs["q"][0, 1, 5, 3] = value
    assert_right(sample)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("interaction", ["joint", "agent"])
@pytest.mark.parametrize("layouts", [*itertools.permutations(("contiguous", "token_major", "packed"))], ids=str)
def test_layouts_that_differ(layouts, interaction):
    drawn = [sample_of(layout).kwargs for layout in layouts]
    mixed = {name: given[name] for name, given in zip("qkv", drawn, strict=True)}
    assert_right(Sample("mixed", drawn[0] | mixed | {"interaction": interaction}))


@pytest.mark.usefixtures("libraries")
def test_projections_are_read_where_they_are():
    sample = sample_of("packed")
    q, k, v = (sample.kwargs[name] for name in "qkv")
    pool, attend = launches_of(sample)
    assert [x.data_ptr() for x in pool["args"][:2]] == [k.data_ptr(), v.data_ptr()]
    assert [x.data_ptr() for x in attend["args"][:3]] == [q.data_ptr(), k.data_ptr(), v.data_ptr()]
    assert "VECTOR=8" in attend["defines"]


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("ragged", ["gri_attention_pool", "gri_attention_attend"]),
        ("only_regions", ["gri_attention_attend"]),
        ("window_is_the_map_gated_masked", ["gri_attention_attend"]),
        ("window_beyond_the_map_agent", ["gri_attention_attend"]),
        ("empty_batch", []),
        ("no_heads", []),
    ],
)
def test_launches(name, kernels):
    assert [launch["kernel"] for launch in launches_of(sample_of(name))] == kernels


def test_sanitized():
    """No access outside a tensor or outside shared memory, no misaligned one and no undefined arithmetic."""
    done = host.run_sanitized(SANITIZED)
    assert done.returncode == 0, done.stderr
    assert f"right: {len(SANITIZED_SAMPLES) + len(SANITIZED_CUTS)}" in done.stdout


# Stable Diffusion's maps at 512²: side, width of a head, heads, window, pool
STAGES = [(64, 40, 8, 16, 4), (64, 64, 5, 16, 4), (32, 80, 8, 8, 4), (32, 64, 10, 8, 4), (16, 160, 8, 8, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("side", "width", "heads", "window", "pool"), STAGES)
def test_plan_fills_the_card_with_the_largest_blocks_and_16_byte_accesses(
    side, width, heads, window, pool, batch, dtype
):
    size = {"grid": (side, side), "window": (window, window), "pool": (pool, pool)}
    p = plan(batch=batch, heads=heads, width=width, dtype=dtype, **size)
    assert "VECTOR=8" in p.defines
    blocks = {warps: batch * heads * side * side // (16 * warps) for warps in (4, 2, 1)}
    warps = next((warps for warps in blocks if blocks[warps] >= MULTIPROCESSORS), 1)
    assert p.attend.block[0] == 32 * warps
    # no block without queries, and none that is mostly without
    assert p.attend.grid[0] == blocks[warps]


@pytest.mark.parametrize(
    ("changes", "vector"),
    [
        ({}, 8),
        ({"alignment": 8}, 4),
        ({"alignment": 2}, 1),
        ({"width": 44}, 4),
        ({"width": 42}, 2),
        ({"width": 33}, 1),
    ],
    ids=str,
)
def test_plan_narrows_accesses_where_rows_are_not_aligned(changes, vector):
    assert f"VECTOR={vector}" in plan(**changes).defines


@pytest.mark.parametrize(
    ("layout", "vector"), [("contiguous", 8), ("packed", 8), ("expanded_heads", 8), ("storage_offset", 1)]
)
def test_strides_and_addresses_count(layout, vector):
    *_, attend = launches_of(sample_of(layout))
    assert f"VECTOR={vector}" in attend["defines"]


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 65537, "grid": (2, 2), "window": (1, 1), "pool": (1, 1)},
        {"batch": 65537},
        {"batch": 1, "heads": 1, "grid": (2**15, 2**15), "window": None},
        {"batch": 1, "heads": 1, "grid": (1, 2**30), "window": (1, 1), "pool": None},
        {"batch": 1, "heads": 1, "grid": (1, 1), "window": (1, 1), "pool": None},
        {"multiprocessors": 1},
        {"multiprocessors": 10**5},
    ],
    ids=str,
)
def test_plan_stays_within_the_limits_of_a_launch(changes):
    p = plan(**changes)
    for launch in filter(None, (p.pool, p.attend)):
        assert 0 < launch.grid[0] < 2**31
        assert launch.grid[1:] == (1, 1)
        assert launch.block[0] in (32, 64, 96, 128, 160, 192, 224, 256)


def test_every_width_has_room_in_shared_memory():
    for width, gated in itertools.product(range(1, MAX_WIDTH + 1), (False, True)):
        assert plan(width=width, gated=gated).attend.shared_bytes <= SHARED_BYTES


def test_rejections():
    def reject(device="cuda", dtype=torch.float16, shape=(2, 3, 16, 8), **changes):
        q = torch.empty(shape, device=device, dtype=dtype)
        given = {"q": q, "k": q, "v": q, "grid": (4, shape[2] // 4), "window": 2, "pool": 2} | changes
        return cuda_impl.reject(*arguments(Sample("refused", given)))

    assert reject("cpu") == "q is on cpu; the cuda backend needs CUDA tensors"
    with FakeTensorMode():
        for dtype in DTYPES:
            assert reject(dtype=dtype) is None
            assert reject(dtype=dtype, shape=(2, 3, 16, 256)) is None
        for dtype in (torch.float32, torch.float64):
            assert reject(dtype=dtype).startswith(
                f"q is {dtype}; the cuda backend takes float16 and bfloat16; backend="
            )
        says = "q has heads of width 257; the cuda backend takes up to 256; backend='triton' takes"
        assert reject(shape=(2, 3, 16, 257)).startswith(says)
        assert reject(shape=(1, 1, 2**30, 1), pool=None) is None
        assert reject(shape=(1, 1, 2**30 + 4, 1)).startswith("q has 1073741828 tokens of width 1 in each head; the")
        assert "q has 268435456 samples of 3 heads, which take" in reject(shape=(2**28, 3, 16, 8))
        assert "which take" in reject(shape=(2**25, 1, 64, 200), window=None, pool=1)
        assert reject(shape=(0, 3, 16, 8)) is None
        assert reject(shape=(65537, 8, 64, 8), pool=None) is None


def test_module_needs_no_cuda_package():
    done = subprocess.run([sys.executable, "-c", WITHOUT_CUDA], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "q is on cpu; the cuda backend needs CUDA tensors"


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_on_a_card(dtype, name):
    sample = named(cases.samples("cuda", dtype), name)
    check_op(op, sample, "cuda")
    first, second = (gri_attention(**sample.kwargs, backend="cuda") for _ in range(2))
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
