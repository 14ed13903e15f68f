"""What is particular to group_norm_silu: derivatives that are refused, plans, cuts of large maps, exact bounds."""

import math
import os
from types import SimpleNamespace

import pytest
import torch

from fastsd_kernels import group_norm_silu
from fastsd_kernels.group_norm_silu import cuda_impl, op
from fastsd_kernels.testing import Sample, check_result, feature_map
from fastsd_kernels.testing.inputs import random_tensor
from tests.contract import covering
from tests.contract.check import check_all
from tests.runners import RUNNERS, host, protocol
from tests.runners.interpreter import small_tiles
from tests.runners.launches import named

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("contiguous", "channels_last")
FLOAT32 = {"device": "cpu", "dtype": torch.float32}

triton_impl = op.backends["triton"].module


def test_forward_mode_is_refused():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            group_norm_silu(x, 2)
        group_norm_silu(torch.randn(1, 4, 2, 2), 2)
    x = torch.randn(1, 4, 2, 2)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: group_norm_silu(x, 2), (x,), (x,))
    torch.func.jvp(lambda y: y * group_norm_silu(x, 2), (x,), (x,))


def test_second_gradients():
    like = {"dtype": torch.float64, "requires_grad": True}
    x, skip = torch.randn(2, 4, 3, 2, **like), torch.randn(2, 4, 3, 2, **like)
    weight, bias, channel_bias = torch.randn(8, **like), torch.randn(8, **like), torch.randn(2, 8, **like)
    torch.autograd.gradgradcheck(
        lambda x, w, b, c, s: group_norm_silu(x, 4, w, b, 1e-3, channel_bias=c, skip=s),
        (x, weight, bias, channel_bias, skip),
    )


@pytest.mark.parametrize("runner", ["cpu", "interpreter", "host"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_maps_give_exactly_zero(runner, layout):
    """A mean that is off by its own rounding shows here: it is multiplied by 1/sqrt(eps)."""
    runner = RUNNERS[runner]
    sample = covering.samples(op, "cpu", torch.float32)[f"long_constant_{layout}"]
    y = runner.run(op, sample, {name: values[0] for name, values in runner.settings.items()})
    assert torch.equal(y, torch.zeros_like(y))


# --- CPU


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(3, 96, 40, 33), (3, 1216, 9, 9)], ids=str)
def test_threads_do_not_change_a_bit(layout, dtype, size):
    x = feature_map(size, layout, device="cpu", dtype=dtype)
    skip = feature_map((size[0], 64, *size[2:]), layout, device="cpu", dtype=dtype, seed=1)
    cpu, sample = RUNNERS["cpu"], Sample("", {"x": x, "num_groups": 32, "skip": skip})
    first, *others = (cpu.run(op, sample, {"isa": cpu.settings["isa"][-1], "threads": n}) for n in (1, 2, 5))
    assert all(torch.equal(first, other) for other in others)


# shape, channels of skip, groups, mean, size of the channel bias
REAL = [
    ((2, 320, 64, 64), 0, 32, 0, 0),
    ((1, 1280, 16, 16), 0, 32, 0, 0),
    ((2, 1920, 8, 8), 0, 32, 0, 0),
    ((1, 128, 181, 127), 0, 32, 0, 0),
    ((1, 320, 64, 64), 0, 32, 10_000, 1000),
    # small maps, if channels last cut by groups: 9 of them, two to a bundle, which may lie across x and skip
    *(((2, 1152 - skip_channels, 9, 8), skip_channels, 9, 0, 1) for skip_channels in (0, 300, 1000)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "skip_channels", "groups", "mean", "shift"), REAL, ids=str)
def test_error_at_real_sizes(layout, shape, skip_channels, groups, mean, shift):
    batch, channels, *space = shape
    x, skip = (
        feature_map((batch, count, *space), layout, **FLOAT32, seed=count) + mean if count else None
        for count in (channels, skip_channels)
    )
    channel_bias = random_tensor((batch, channels + skip_channels), **FLOAT32) * shift
    sample = Sample("", {"x": x, "num_groups": groups, "channel_bias": channel_bias, "skip": skip})
    exact = protocol.call(op, sample.map_tensors(torch.Tensor.double), "reference")
    assert (protocol.call(op, sample, "cpu") - exact).abs().max() <= (1e-5 if mean else 2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [80.0, 87.5, 88.3, 88.7, 89.0, 100.0, 1e10, 1e38])
def test_silu_far_from_zero(layout, size):
    """A group of -1 and 1, times a weight: for a large u, SiLU is u; for a small one, next to nothing."""
    x = torch.tensor([-1.0, 1.0]).repeat(16).reshape(1, 2, 4, 4)
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    y = group_norm_silu(x, 1, torch.full((2,), size), eps=0.0, backend="cpu")
    torch.testing.assert_close(y[x > 0], torch.full((16,), size))
    assert y[x < 0].abs().max() <= 2e-33  # 80 exp(-80)


@pytest.mark.long
def test_more_than_2_31_elements():
    elements = 2**31 + 2**20
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < 3 * elements:  # zeros that nobody wrote take no memory
        pytest.skip(f"needs {3 * elements / 2**30:.0f} GiB of free memory")
    torch.use_deterministic_algorithms(False)  # or the result would be filled with NaN first
    x = torch.zeros(elements // 2**20, 2**10, 2**10, dtype=torch.float16)[:, :, :, None]
    x[-1] = feature_map((2**10, 2**10, 1), "contiguous", device="cpu", dtype=torch.float16)
    last = group_norm_silu(x[-1:].clone(), 32, activation="none", backend="cpu")
    assert torch.equal(group_norm_silu(x, 32, activation="none", backend="cpu")[-1:], last)


# --- plans of either kind of card's kernels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps_of_unets_fill_the_card_with_16_byte_accesses(dtype, layout):
    for shape in ((1, 320, 64, 64), (2, 320, 64, 64), (2, 960, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16)):
        x = torch.empty(shape, dtype=dtype)
        x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
        sample = Sample("", {"x": x, "num_groups": 32})
        stats, apply = RUNNERS["host"].launches(op, sample)
        assert f"VECTOR={16 // dtype.itemsize}" in stats["defines"]
        grids = [stats["grid"], apply["grid"]]
        if shape[0] == 1 and dtype in RUNNERS["interpreter"].dtypes:
            grids += [launch.grid for launch in RUNNERS["interpreter"].launches(op, sample)]
        assert min(map(math.prod, grids)) >= host.MULTIPROCESSORS


def plan(**changes):
    """The CUDA kernels' plan of a map of 320 channels on 64 × 64 positions."""
    given = {"batch": 1, "x_channels": 320, "skip_channels": 0, "space": 64 * 64, "num_groups": 32}
    given |= {"channels_last": True, "dtype": torch.float16, "parameter_dtype": torch.float16}
    return cuda_impl.plan(**given | {"alignment": 16, "multiprocessors": host.MULTIPROCESSORS} | changes)


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
        ({"x_channels": 32 * 1000}, 8),
        ({"x_channels": 32 * 999}, 1),
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


def test_more_groups_than_blocks_are_refused():
    with host.as_a_card(None):
        sentence = cuda_impl.reject(torch.empty(2**28, 8, 0), 4, None, None, 1e-5, "silu", None, None)
    assert "268435456 samples of 8 channels" in sentence


@pytest.mark.parametrize("runner", ["cpu", "host", "interpreter"])
def test_no_other_sample_is_refused(runner):
    """Which would leave it out of the contract's tests."""
    left_out = op.cases.NOT_INTERPRETED if runner == "interpreter" else ()
    for dtype in RUNNERS[runner].dtypes:
        samples = covering.samples(op, "cpu", dtype)
        served = RUNNERS[runner].served(op, samples)
        assert {*served} == {name for name in samples if not name.startswith(left_out)}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    ("batch", "channels", "groups", "space"),
    [
        (1, 320, 32, 64 * 64),
        (2, 2560, 32, 8 * 8),
        (1, 128, 32, 1024 * 1024),
        (3, 30, 10, 63),
        (1, 640, 1, 5),
        (2, 7, 7, 1),
        (65_537, 4, 2, 2),
    ],
)
def test_tiles_cover_the_maps_once(batch, channels, groups, space, itemsize, channels_last):
    """In Triton."""
    p = triton_impl.plan(batch, channels, groups, space, channels_last, itemsize)
    groups_covered = p.channel_tiles // p.tiles_per_group * p.groups_per_tile
    assert groups <= groups_covered < groups + p.groups_per_tile
    assert channels // groups * p.groups_per_tile <= p.block_c * p.tiles_per_group
    positions = p.splits * p.tiles_per_split * p.block_s
    assert space <= positions < space + p.tiles_per_split * p.block_s
    assert p.groups_per_tile <= p.block_g


# --- maps that are cut

# shape, groups, layouts that are cut so, and whether a launch of the CUDA kernel of statistics is
CUTS = {
    "more splits than a warp has lanes": ((1, 4, 100, 99), 1, LAYOUTS, lambda c: c.splits > 32),
    "three pieces, the last one short": ((2, 2100, 3), 1, LAYOUTS, lambda c: c.pieces == 3 and c.width % c.tile > 0),
    "pieces and chunks": ((1, 2064, 20), 2, LAYOUTS, lambda c: c.pieces > 1 < c.chunks),
    "short tile of groups": ((1, 150, 2), 150, LAYOUTS[1:], lambda c: c.tile > c.width and c.channels % c.tile > 0),
    "more columns than threads": ((1, 1023, 3), 3, LAYOUTS[1:], lambda c: c.last and c.tile // c.vector > c.threads),
}


def cut_of(launch):
    _, a = named(launch)
    splits, channels, chunks, given = a["partials"].shape[2], a["x_channels"], a["chunks"], launch["defines"]
    vector, last = int(given[2].removeprefix("VECTOR=")), given[3] == "CHANNELS_LAST=1"
    width, pieces = channels // a["num_groups"], splits // chunks
    of = {"splits": splits, "chunks": chunks, "pieces": pieces, "width": width, "channels": channels}
    return SimpleNamespace(**of, vector=vector, last=last, tile=a["tile"], threads=launch["block"][0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cut", CUTS)
def test_cuts(cut, layout, monkeypatch):
    monkeypatch.setattr(host, "MULTIPROCESSORS", 64)
    shape, groups, layouts, takes = CUTS[cut]
    # partial means that differ, by little beside their size
    x = feature_map(shape, layout, **FLOAT32) + 10000 + torch.arange(shape[-1]) / shape[-1]
    weight, channel_bias = random_tensor(shape[1:2], **FLOAT32), random_tensor(shape[:2], **FLOAT32)
    sample = Sample(cut, {"x": x, "num_groups": groups, "weight": weight, "channel_bias": channel_bias})
    assert takes(cut_of(RUNNERS["host"].launches(op, sample)[0])) == (layout in layouts)
    check_all(op, RUNNERS["host"], sample)


@pytest.mark.parametrize("layout", [pytest.param("contiguous", marks=pytest.mark.long), "channels_last"])
@pytest.mark.parametrize("name", op.cases.NOT_INTERPRETED)
def test_interpreted_as_launched(name, layout):
    sample = covering.samples(op, "cpu", torch.float32)[f"{name}_{layout}"]
    check_result(op, sample, RUNNERS["interpreter"].run(op, sample, {"tiles": "as_launched"}))


def test_small_tiles_take_the_paths_of_large_maps():
    paths, samples = set(), covering.samples(op, "cpu", torch.float32).values()
    samples = [sample for sample in samples if not sample.name.startswith(op.cases.NOT_INTERPRETED)]
    with small_tiles("group_norm_silu"):
        launches = [launch for sample in samples for launch in RUNNERS["interpreter"].launches(op, sample)[1:]]
    for _, a in map(named, launches):
        tiles, splits, steps = a["TILES_PER_GROUP"], a["splits"], a["tiles_per_split"]
        taken = {
            "a group over several tiles, the last one short": tiles > 1 and a["GROUP_CHANNELS"] % a["BLOCK_C"] > 0,
            "splits of several tiles, the last one short": splits > 1 < steps
            and a["space"] % (steps * a["BLOCK_S"]) > 0,
            "parts of several tiles, merged in steps": splits > 1 < tiles and splits * tiles > a["BLOCK_P"],
        }
        paths |= {(a["CHANNELS_LAST"], path) for path in taken if taken[path]}
    assert paths == {(layout, path) for layout in (False, True) for path in taken}


@pytest.mark.gpu
@pytest.mark.parametrize("runner", ["card-triton", "card-cuda"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "skip_channels", "groups"),
    [
        ((1, 320, 64, 64), 0, 32),
        ((2, 640, 64, 64), 320, 32),
        ((2, 1280, 8, 8), 1280, 32),
        ((1, 128, 512, 512), 0, 32),
        ((1, 640, 33, 31), 0, 1),
    ],
    ids=str,
)
def test_maps_of_unets_and_decoders_on_a_card(runner, layout, shape, skip_channels, groups):
    for dtype in DTYPES:
        like, channels = {"device": "cuda", "dtype": dtype}, shape[1] + skip_channels
        skip = feature_map((shape[0], skip_channels, *shape[2:]), layout, **like, seed=4) if skip_channels else None
        weight, bias = (random_tensor((channels,), **like, seed=seed) for seed in (1, 2))
        given = {"x": feature_map(shape, layout, **like), "num_groups": groups, "weight": weight, "bias": bias}
        check_all(op, RUNNERS[runner], Sample(str(dtype), given | {"skip": skip}))
