"""attention's CUDA kernel: on the host, thread by thread, and on a card."""

import functools
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastsd_kernels import attention
from fastsd_kernels.attention import cases, cuda_impl, op
from fastsd_kernels.testing import Sample, assert_contract, check_op, named
from fastsd_kernels.testing.inputs import random_tensor
from fastsd_kernels.testing.tokens import in_heads
from tests.harness import host

NAMES = [sample.name for sample in cases.samples("cpu", torch.float32)]
DTYPES = (torch.float16, torch.bfloat16)
# Elements of one size are accessed alike, so bfloat16 is left out
SANITIZED_SAMPLES = (
    "contiguous",
    "packed",
    "sliced_width_across",
    "storage_offset",
    "width_40",
    "width_33",
    "1_queries_1_keys",
    "65_queries_130_keys_biased",
    "1_queries_77_keys_biased",
    "expanded_bias",
    "nan_all_keys_left_out",
)
SANITIZED_CUTS = ("several_tiles", "whole_tiles", "wide_text", "quarter_pieces")
MULTIPROCESSORS = 132
SHARED_BYTES = 99 * 1024  # of the smallest cards from compute capability 8.0 on, for one block

SANITIZED = """
from tests.kernels import test_attention_cuda as tests
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
from fastsd_kernels.attention import cuda_impl
q = torch.zeros(1, 2, 4, 8)
print(cuda_impl.reject(q, q, q, None, None))
"""

# What the samples are too small for: queries, keys, width, layout, whether there is a bias; how the plan must cut it
CUTS: dict[str, tuple[int, int, int, str, bool, tuple[str, ...]]] = {
    "several_tiles": (130, 150, 40, "token_major", True, ("WARPS=4", "KEYS=64", "VECTOR=8")),
    "whole_tiles": (128, 128, 64, "packed", False, ("WARPS=4", "KEYS=64", "VECTOR=8")),
    "text": (70, 77, 40, "token_major", True, ("WARPS=4", "KEYS=80", "VECTOR=8")),
    "wider_text": (40, 77, 80, "token_major", False, ("WARPS=4", "KEYS=80", "VECTOR=8")),
    "longest_tile": (20, 80, 64, "contiguous", True, ("WARPS=2", "KEYS=80")),
    "beyond_one_tile": (20, 81, 64, "contiguous", True, ("WARPS=2", "KEYS=64")),
    "wide": (66, 70, 160, "contiguous", False, ("WARPS=4", "KEYS=32")),
    "wide_text": (33, 77, 160, "contiguous", True, ("WARPS=4", "KEYS=32")),
    "widest": (33, 40, 256, "contiguous", False, ("WARPS=4", "KEYS=16")),
    "quarter_pieces": (40, 90, 100, "token_major", True, ("WARPS=4", "KEYS=32", "VECTOR=4")),
    "pairs": (40, 90, 6, "contiguous", False, ("WARPS=4", "KEYS=64", "VECTOR=2")),
}


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
    queries, keys, width, layout, biased, _ = CUTS[name]
    like: dict[str, Any] = {"device": "cpu", "dtype": dtype}
    if layout == "packed":
        given = dict(zip("qkv", cases.tokens(1, 2, queries, width, layout, **like), strict=True))
    else:
        sizes = {"q": queries, "k": keys, "v": keys}
        given = {of: in_heads(1, 2, count, width, layout, **like, seed=ord(of)) for of, count in sizes.items()}
    bias = {"bias": random_tensor((1, keys), **like, seed=4)} if biased else {}
    return Sample(name, given | bias)


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
    given = {"bias": None, "scale": None} | sample.kwargs
    return cuda_impl.compute(launch, multiprocessors, *(given[name] for name in ("q", "k", "v", "bias", "scale")))


@functools.cache
def planned_otherwise():
    """The samples that a card of MULTIPROCESSORS cuts otherwise than one that has a single one."""
    return [name for name in NAMES if planned(name, MULTIPROCESSORS) != planned(name, 1)]


def planned(name, multiprocessors):
    return [launch["defines"] for launch in launches_of(sample_of(name), multiprocessors)]


def assert_right(sample, multiprocessors=1):
    """Within the contract, with the reference's strides, and the same bits in the opposite order of threads."""
    actual = compute(sample, host.launch, multiprocessors)
    plain = attention(**sample.kwargs, backend="reference")
    exact = attention(**sample.map_tensors(Tensor.double).kwargs, backend="reference")
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
            "queries": 4096,
            "keys": 4096,
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
    assert set(defines) <= set(launches_of(sample)[0]["defines"])
    assert_right(sample)


@pytest.mark.usefixtures("libraries_for_a_large_card")
@pytest.mark.parametrize("name", planned_otherwise())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_blocks_for_a_large_card(dtype, name):
    sample = sample_of(name, dtype)
    assert "WARPS=1" in launches_of(sample, MULTIPROCESSORS)[0]["defines"]
    assert_right(sample, MULTIPROCESSORS)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["contiguous", "65_queries_130_keys_biased"])
@pytest.mark.parametrize("of", ["q", "bias"])
def test_values_that_are_not_finite(of, name, value):
    sample = sample_of(name)
    if of == "q":
        sample.kwargs["q"][0, 1, 5, 3] = value
    else:
        sample.kwargs["bias"] = torch.zeros(2, sample.kwargs["k"].shape[2], dtype=torch.float16)
        sample.kwargs["bias"][1, 9] = value
    assert_right(sample)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    "left_out", [slice(0, 64), slice(64, 128), slice(64, 130), slice(0, 129), slice(0, 130)], ids=str
)
def test_tiles_that_are_left_out(left_out):
    sample = sample_of("65_queries_130_keys")
    sample.kwargs["bias"] = torch.zeros(1, 130)
    sample.kwargs["bias"][0, left_out] = -torch.inf
    assert_right(sample)


@pytest.mark.usefixtures("libraries")
def test_lowest_numbers_weigh_all_keys_alike():
    """Masks of torch.finfo(…).min are not -inf: where all keys have it, the mean of the values is meant."""
    sample = sample_of("65_queries_130_keys", torch.bfloat16)
    sample.kwargs["bias"] = torch.full((1, 130), torch.finfo(torch.float32).min)
    mean = sample.kwargs["v"].double().mean(2, keepdim=True)
    torch.testing.assert_close(compute(sample, host.launch).double(), mean.expand(-1, -1, 65, -1), rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("layouts", [*itertools.permutations(("contiguous", "token_major", "packed"))], ids=str)
def test_layouts_that_differ(layouts):
    drawn = [sample_of(layout).kwargs for layout in layouts]
    assert_right(Sample("mixed", {name: given[name] for name, given in zip("qkv", drawn, strict=True)}))


@pytest.mark.usefixtures("libraries")
def test_projections_are_read_where_they_are():
    sample = sample_of("packed")
    (attend,) = launches_of(sample)
    assert [x.data_ptr() for x in attend["args"][:3]] == [sample.kwargs[name].data_ptr() for name in "qkv"]
    assert "VECTOR=8" in attend["defines"]


@pytest.mark.parametrize("name", ["empty_batch", "no_heads", "no_queries"])
def test_nothing_is_launched_for_an_empty_result(name):
    assert not launches_of(sample_of(name))


def test_sanitized():
    """No access outside a tensor or outside shared memory, no misaligned one and no undefined arithmetic."""
    done = host.run_sanitized(SANITIZED)
    assert done.returncode == 0, done.stderr
    assert f"right: {len(SANITIZED_SAMPLES) + len(SANITIZED_CUTS)}" in done.stdout


# Stable Diffusion's maps at 512² and 1024²: side, width of a head, heads
STAGES = [(64, 40, 8), (64, 64, 5), (64, 64, 10), (32, 80, 8), (32, 64, 20), (16, 160, 8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(("side", "width", "heads"), STAGES)
def test_plan_fills_the_card_with_the_largest_blocks_and_16_byte_accesses(side, width, heads, text, batch, dtype):
    keys = 77 if text else side * side
    p = plan(batch=batch, heads=heads, width=width, queries=side * side, keys=keys, dtype=dtype)
    assert "VECTOR=8" in p.defines
    assert ("KEYS=80" in p.defines) == (text and width <= 80)
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
    ("layout", "vector"),
    [("contiguous", 8), ("packed", 8), ("expanded_heads", 8), ("strided_width", 8), ("storage_offset", 1)],
)
def test_strides_and_addresses_count(layout, vector):
    (attend,) = launches_of(sample_of(layout))
    assert f"VECTOR={vector}" in attend["defines"]


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 65537},
        {"batch": 65537, "queries": 1},
        {"batch": 1, "heads": 1, "width": 1, "queries": 2**30},
        {"batch": 1, "heads": 1, "width": 1, "keys": 2**30},
        {"batch": 1, "heads": 1, "queries": 1, "keys": 1},
        {"multiprocessors": 1},
        {"multiprocessors": 10**5},
    ],
    ids=str,
)
def test_plan_stays_within_the_limits_of_a_launch(changes):
    attend = plan(**changes).attend
    assert 0 < attend.grid[0] < 2**31
    assert attend.grid[1:] == (1, 1)
    assert attend.block[0] in (32, 64, 128)


def test_every_width_has_room_in_shared_memory():
    for width, keys in itertools.product(range(1, cuda_impl.MAX_WIDTH + 1), (1, 77, 4096)):
        assert plan(width=width, keys=keys).attend.shared_bytes <= SHARED_BYTES


def test_one_tile_of_keys_takes_the_room_of_one():
    (one,), (two,) = (launches_of(cut(name)) for name in ("longest_tile", "beyond_one_tile"))
    # 32 queries; rows of 64 + 8 elements of 2 bytes, and 4 bytes of bias
    assert one["shared_bytes"] == (32 + 2 * 80) * 144 + 4 * 80
    assert two["shared_bytes"] == (32 + 4 * 64) * 144 + 4 * 128


def test_rejections():
    def reject(device="cuda", dtype=torch.float16, shape=(2, 3, 16, 8), keys=16):
        q = torch.empty(shape, device=device, dtype=dtype)
        k = q.new_empty((*shape[:2], keys, shape[3]))
        return cuda_impl.reject(q, k, k, None, None)

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
        assert reject(shape=(1, 1, 2**30, 1)) is None
        assert reject(shape=(1, 1, 2**30 + 1, 1)).startswith("q has 1073741825 tokens of width 1 in each head; the")
        assert reject(shape=(1, 1, 1, 1), keys=2**30) is None
        assert reject(shape=(1, 1, 1, 2), keys=2**30).startswith("k has 1073741824 tokens of width 2 in each head; the")
        assert "q has 715827883 samples of 3 heads, which take" in reject(shape=(715_827_883, 3, 16, 8))
        assert "which take" in reject(shape=(2**25, 1, 1024, 8))
        assert reject(shape=(0, 3, 16, 8)) is None
        assert reject(shape=(65537, 8, 64, 8)) is None


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
    first, second = (attention(**sample.kwargs, backend="cuda") for _ in range(2))
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
