"""What is particular to gri_attention: its definition by token, how its backends cut a map, and its own gradient."""

import itertools
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastsd_kernels import cuda_runtime, gri_attention, triton_runtime
from fastsd_kernels.attention.cuda_impl import MAX_WIDTH
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.gri_attention import cuda_impl, op, reference, triton_backward
from fastsd_kernels.testing import Sample
from fastsd_kernels.testing.contract import FLOOR_ULPS
from fastsd_kernels.testing.inputs import random_tensor
from fastsd_kernels.testing.tokens import tokens
from tests.contract import covering
from tests.contract.check import check, check_all, check_threads
from tests.contract.patterns import is_finite
from tests.runners import RUNNERS, host, interpreter
from tests.runners.protocol import attributes

CPU, HOST, INTERPRETER = RUNNERS["cpu"], RUNNERS["host"], RUNNERS["interpreter"]
triton_impl = op.backends["triton"].module

# heads, map, width, window, pool: windows and maps of several tasks, rows of two vectors more
SIZES = {
    "windows": (2, (63, 65), 40, 8, 8),
    "windows_of_several_tasks": (2, (40, 33), 40, 20, 4),
    "wide": (2, (24, 40), 160, 16, 4),
    "full_attention": (2, (33, 40), 64, 64, 4),
    "only_cells": (2, (33, 40), 40, None, 4),
}
# What the samples are too small for: map, window, pool, width, what else is given, and how a card of one
# multiprocessor must cut it
CUTS: dict[str, tuple[tuple[int, int], Any, Any, int, dict[str, Any], set[str]]] = {
    # the windows at the edges have fewer tiles than the grid has blocks for
    "several_query_tiles": ((12, 20), (10, 16), 3, 40, {}, {"WARPS=4", "KEYS=64", "VECTOR=8"}),
    "two_warps": ((4, 16), (4, 8), 2, 64, {"layout": "packed"}, {"WARPS=2", "KEYS=64", "VECTOR=8"}),
    "tiles_of_runs": ((9, 15), None, 3, 80, {"layout": "token_major"}, {"WARPS=4", "KEYS=64"}),
    "wide": ((8, 12), (8, 8), 4, 160, {}, {"WARPS=4", "KEYS=32"}),
    # what the regions leave in shared memory has no room with four warps
    "wide_gated": ((8, 12), (8, 8), 4, 160, {"interaction": "gated"}, {"WARPS=2", "KEYS=32"}),
    "widest": ((8, 9), (8, 8), 4, 256, {}, {"WARPS=4", "KEYS=16"}),
    "widest_gated": ((8, 9), (8, 8), 4, 256, {"interaction": "gated"}, {"WARPS=2", "KEYS=16"}),
    "quarter_pieces": ((8, 9), 8, 3, 100, {"layout": "token_major"}, {"WARPS=4", "KEYS=32", "VECTOR=4"}),
    "pairs": ((8, 9), 8, 3, 6, {}, {"WARPS=4", "KEYS=64", "VECTOR=2"}),
    "agent": ((12, 12), 8, 2, 64, {"interaction": "agent", "layout": "token_major"}, {"WARPS=4"}),
    # the softmax begins with a tile of which nothing counts
    "first_cells_left_out": ((12, 16), (8, 16), 1, 8, {"interaction": "gated", "mask_own_window": True}, {"WARPS=4"}),
    "first_and_last_cells_left_out": ((20, 16), (8, 16), 1, 8, {"mask_own_window": True}, {"WARPS=4"}),
    "wide_pool": ((16, 24), 4, (16, 11), 8, {"heads": 1}, {"WARPS=1"}),
}
# Of U-Nets and an autoencoder: heads, width of a head, side of the map, window, pool
UNETS = (
    (8, 40, 64, 16, 4),
    (5, 64, 64, 16, 4),
    (8, 80, 32, 8, 4),
    (10, 64, 32, 8, 4),
    (8, 160, 16, 8, 2),
    (8, 40, 72, 16, 8),
    (1, 512, 32, 8, 4),
)
DEFAULTS: dict[str, Any] = {"interaction": "joint", "mask_own_window": False, "gate": None, "scale": None}


def of_size(
    heads, grid, width, window, pool, dtype=torch.float16, layout="token_major", batch=1, interaction="joint", **given
) -> Sample:
    like: dict[str, Any] = {"device": "cpu", "dtype": dtype}
    q, k, v = tokens(batch, heads, grid[0] * grid[1], width, layout, **like)
    if interaction == "gated":
        given["gate"] = random_tensor((heads,), **like, seed=9)
    sizes = {"grid": grid, "window": window, "pool": pool, "interaction": interaction}
    return Sample("of_size", {"q": q, "k": k, "v": v} | sizes | given)


def cut(name: str, dtype=torch.float16) -> Sample:
    grid, window, pool, width, given, _ = CUTS[name]
    given = {"heads": 2, "layout": "contiguous"} | given
    return of_size(grid=grid, width=width, window=window, pool=pool, dtype=dtype, **given)


def sample_of(name: str, dtype=torch.float16) -> Sample:
    return covering.samples(op, "cpu", dtype)[name]


def in_full(sample: Sample) -> dict[str, Any]:
    """All arguments of the backends, in their order."""
    given = {name: sample.kwargs[name] for name in ("q", "k", "v", "grid", "window", "pool")} | DEFAULTS | sample.kwargs
    return {name: [x] * 2 if name in ("window", "pool") and isinstance(x, int) else x for name, x in given.items()}


def arguments(launch) -> dict[str, Any]:
    return dict(zip(launch.kernel.arg_names, launch.args, strict=True))


def drawn(grid=(6, 5), dtype=torch.float64, batch=2) -> tuple[Tensor, ...]:
    return tokens(batch, 2, grid[0] * grid[1], 8, "contiguous", device="cpu", dtype=dtype)


@pytest.fixture
def one_multiprocessor(monkeypatch):
    monkeypatch.setattr(host, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(cuda_runtime, "multiprocessors", lambda device: 1)


def by_token(q, k, v, grid, window, pool, interaction, mask_own_window, gate, scale) -> Tensor:
    """The definition a second time, by masks of who is in whose window [N, N], and in which cell [G, N]."""
    s = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    rows, columns = (x.flatten() for x in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    scores, values = [], []
    if window is not None:
        window_of = rows // window[0] * grid[1] + columns // window[1]
        elsewhere = window_of[:, None] != window_of
        scores.append((q @ k.mT * s).masked_fill(elsewhere, -math.inf))
        values.append(v)
    if pool is not None and (window is None or elsewhere.any()):
        cell_of = rows // pool[0] * math.ceil(grid[1] / pool[1]) + columns // pool[1]
        members = (torch.arange(int(cell_of.max()) + 1)[:, None] == cell_of).double()
        mean = members / members.sum(1, keepdim=True)
        scores.append(q @ (mean @ k).mT * s + members.sum(1).log())
        if mask_own_window:  # no token of the cell is elsewhere
            scores[-1] = scores[-1].masked_fill(elsewhere.double() @ members.mT == 0, -math.inf)
        values.append(F.softmax(mean @ q @ k.mT * s, -1) @ v if interaction == "agent" else mean @ v)
    if interaction == "gated" and len(scores) == 2:
        share = torch.sigmoid(gate)[:, None, None]
        regional, of_cells = (F.softmax(x, -1) @ y for x, y in zip(scores, values, strict=True))
        return share * regional + (1 - share) * of_cells
    return F.softmax(torch.cat(scores, -1), -1) @ torch.cat(values, 2)


def test_reference_is_the_definition_by_token():
    for drawn in covering.samples(op, "cpu", torch.float64).values():
        sample = drawn.map_tensors(Tensor.double)
        if is_finite(sample) and sample.kwargs["q"].numel():
            expected = by_token(**in_full(sample))
            actual = gri_attention(**sample.kwargs, backend="reference")
            close = {"rtol": 1e-10, "atol": 1e-10, "equal_nan": True}
            torch.testing.assert_close(actual, expected, **close, msg=lambda text, of=sample: f"{of}: {text}")


@pytest.mark.parametrize(
    ("window", "pool", "given"),
    [
        ((6, 5), 2, {}),
        (8, 2, {"interaction": "gated", "gate": torch.zeros(2).double()}),
        (8, 2, {"interaction": "agent"}),
        (None, 1, {}),
        # every token is seen once: those of the window as they are, all others as cells of one
        (3, 1, {"mask_own_window": True}),
    ],
    ids=str,
)
def test_full_attention(window, pool, given):
    q, k, v = drawn()
    y = gri_attention(q, k, v, grid=(6, 5), window=window, pool=pool, **given, backend="reference")
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-12)


def test_cells_stand_for_their_tokens():
    """Where these are alike, nothing is lost but the own window's second count."""
    q, k, v = drawn((8, 8))
    first = torch.arange(64).view(8, 8)[::2, ::2].repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
    k, v = k[:, :, first], v[:, :, first]
    y = gri_attention(q, k, v, grid=(8, 8), window=4, pool=2, mask_own_window=True, backend="reference")
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("interaction", ["joint", "gated", "agent"])
def test_second_gradients(interaction):
    given = {"grid": (2, 3), "window": (1, 2), "pool": (2, 2), "interaction": interaction}
    shapes = [(1, 2, 6, 3)] * 3 + ([(2,)] if interaction == "gated" else [])
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    torch.autograd.gradgradcheck(
        lambda q, k, v, gate=None: gri_attention(q, k, v, gate=gate, **given), leaves, fast_mode=True
    )


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_gradients_of_16_bits(dtype, most, size):
    """They are computed in float32: products of numbers around 100 overflow float16 before they are scaled."""
    q, k, v = (x.to(dtype) for x in drawn((8, 8)))
    given = {"grid": (8, 8), "window": 4, "pool": 2, "scale": 8**-0.5 / size**2}
    gradients = []
    for as_dtype in (dtype, torch.float64):
        leaves = [x.detach().to(as_dtype, copy=True).requires_grad_() for x in (q * size, k * size, v)]
        gri_attention(*leaves, **given).backward(v.to(as_dtype))
        gradients.append([x.grad.double() for x in leaves])
    for actual, exact in zip(*gradients, strict=True):
        assert (actual - exact).norm() <= most * exact.norm()


def test_autocast():
    q, k, v = drawn(dtype=torch.float32)
    given = {"grid": (6, 5), "window": 2, "pool": 2}
    with torch.autocast("cpu", torch.bfloat16):
        y = gri_attention(q, k, v, **given)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, gri_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **given))


def test_sizes_are_integers_or_pairs():
    q, k, v = drawn()
    given = {"grid": (6, 5), "window": (2, 2), "pool": (2, 2)}
    y = gri_attention(q, k, v, **given)
    assert torch.equal(gri_attention(q, k, v, grid=torch.Size([6, 5]), window=torch.tensor(2), pool=2), y)
    for wrong, says in (
        ({"window": 2.0}, r"window: .*2\.0"),
        ({"pool": "22"}, "pool: .*'22'"),
        ({"grid": (6, 5.0)}, r"grid: .*5\.0"),
    ):
        with pytest.raises(TypeError, match=says):
            gri_attention(q, k, v, **given | wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_on_the_cpu(name, dtype):
    check_threads(op, CPU, of_size(*SIZES[name], dtype))


@pytest.mark.parametrize("isa", CPU.settings["isa"])
def test_each_key_in_turn_has_all_the_weight(isa):
    """Behind the first block of keys and at the seams of segments too; and a score that underflows counts nothing."""
    wanted = torch.tensor([0, 29, 30, 127, 128, 129, 255, 256, 359])
    k = torch.zeros(9, 1, 360, 4)
    k[range(9), 0, wanted] = 250.0
    given = {"q": torch.ones(9, 1, 360, 4), "k": k, "v": torch.arange(360.0)[:, None].expand(9, 1, 360, 4)}
    sample = Sample("one_key", given | {"grid": (12, 30), "window": (12, 30), "pool": 4, "scale": 1.0})
    y = CPU.run(op, sample, {"isa": isa, "threads": 1})
    assert torch.equal(y, wanted.float()[:, None, None, None].expand_as(y))


def test_tokens_of_no_map_are_refused_on_the_cpu():
    q = torch.randn(1, 2, 16, 4)
    with pytest.raises(ValueError, match="tokens of a map"):
        torch.ops.fastsd_cpu.gri_attention.default(
            q, q, q, 4, 5, 2, 2, 2, 2, False, None, None, 1.0, 0, torch.empty_like(q)
        )


@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize("name", CUTS)
def test_cuts(name):
    *_, attend = HOST.launches(op, cut(name))
    assert CUTS[name][-1] <= set(attend["defines"])
    check(op, HOST, cut(name), {"seed": 0})


def test_a_card_that_they_do_not_fill_gets_small_blocks(monkeypatch):
    samples = covering.samples(op, "cpu", torch.float16)
    on_a_large_card = HOST.served(op, samples)
    monkeypatch.setattr(host, "MULTIPROCESSORS", 1)
    cut_otherwise = on_a_large_card.items() - HOST.served(op, samples).items()
    assert cut_otherwise
    assert all("WARPS=1" in defines for _, variants in cut_otherwise for _, defines in variants)


@pytest.mark.long
@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cuts_and_samples_in_any_order(dtype):
    samples = covering.samples(op, "cpu", dtype)
    for sample in (*(cut(name, dtype) for name in CUTS), *(samples[name] for name in HOST.served(op, samples))):
        check_all(op, HOST, sample)


@pytest.mark.gpu
@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cuts_on_a_card(dtype, name):
    check(op, RUNNERS["card-cuda"], cut(name, dtype).map_tensors(Tensor.cuda), {})


def of_unets(dtype, size) -> list[Sample]:
    heads, width, side, window, pool = size
    variants = ({}, {"mask_own_window": True}, {"interaction": "gated"}, {"interaction": "agent"})
    sizes = (heads, (side, side), width, window, pool, dtype, "packed", 2)
    return [of_size(*sizes, **given).map_tensors(Tensor.cuda) for given in variants]


@pytest.mark.gpu
@pytest.mark.parametrize("size", UNETS, ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sizes_of_unets_on_a_card(dtype, backend, size):
    if backend == "triton" or (dtype != torch.float32 and size[1] <= MAX_WIDTH):
        for sample in of_unets(dtype, size):
            check(op, RUNNERS[f"card-{backend}"], sample, {})


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("ragged", ["gri_attention_pool", "gri_attention_attend"]),
        ("only_regions", ["gri_attention_attend"]),
        ("window_is_the_map_gated_masked", ["gri_attention_attend"]),
        ("window_beyond_the_map_agent", ["gri_attention_attend"]),
    ],
)
def test_cells_are_made_where_they_are_keys(name, kernels):
    assert [launch["kernel"] for launch in HOST.launches(op, sample_of(name))] == kernels
    assert len(INTERPRETER.launches(op, sample_of(name))) == len(kernels)


def test_projections_are_read_where_they_are():
    given = sample_of("packed").kwargs
    pool, attend = HOST.launches(op, sample_of("packed"))
    pool_cells, attend_all = map(arguments, INTERPRETER.launches(op, sample_of("packed")))
    for kernel, names in ((pool["args"], "kv"), (attend["args"], "qkv")):
        assert [x.data_ptr() for x in kernel[: len(names)]] == [given[name].data_ptr() for name in names]
    for name in "qkv":
        assert attend_all[f"{name}_ptr"].data_ptr() == given[name].data_ptr()
        assert attend_all[f"{name}_ptr"].stride() == given[name].stride()
    assert [pool_cells[f"{name}_ptr"].data_ptr() for name in "ab"] == [given[name].data_ptr() for name in "kv"]
    *_, copied = INTERPRETER.launches(op, sample_of("strided_width"))
    assert copied.args[0].is_contiguous()
    # and so is the result
    for backend in ("reference", "cpu"):
        y = gri_attention(**given, backend=backend)
        assert y.transpose(1, 2).flatten(2).data_ptr() == y.data_ptr()


@pytest.mark.parametrize(
    ("layout", "vector"), [("contiguous", 8), ("packed", 8), ("expanded_heads", 8), ("storage_offset", 1)]
)
def test_accesses_are_as_wide_as_strides_and_addresses_allow(layout, vector):
    *_, attend = HOST.launches(op, sample_of(layout))
    assert f"VECTOR={vector}" in attend["defines"]


def plan(**changes):
    """The plan of Stable Diffusion 1.5's largest map at 512²."""
    usual = {"batch": 2, "heads": 8, "width": 40, "grid": (64, 64), "window": (16, 16), "pool": (4, 4), "gated": False}
    usual |= {"dtype": torch.float16, "alignment": 16, "multiprocessors": host.MULTIPROCESSORS}
    return cuda_impl.plan(**usual | changes)


@pytest.mark.parametrize(("heads", "width", "side", "window", "pool"), UNETS[:5])
def test_plan_fills_the_card_with_the_largest_blocks_and_16_byte_accesses(heads, width, side, window, pool):
    for batch in (1, 2):
        size = {"grid": (side, side), "window": (window, window), "pool": (pool, pool)}
        p = plan(batch=batch, heads=heads, width=width, **size)
        assert "VECTOR=8" in p.defines
        blocks = {warps: batch * heads * side * side // (16 * warps) for warps in (4, 2, 1)}
        warps = next((warps for warps in blocks if blocks[warps] >= host.MULTIPROCESSORS), 1)
        assert p.attend.block[0] == 32 * warps
        # no block without queries, and none that is mostly without
        assert p.attend.grid[0] == blocks[warps]


@pytest.mark.parametrize(
    ("changes", "vector"),
    [({}, 8), ({"alignment": 8}, 4), ({"alignment": 2}, 1), ({"width": 44}, 4), ({"width": 42}, 2), ({"width": 33}, 1)],
    ids=str,
)
def test_plan_narrows_accesses_where_rows_are_not_aligned(changes, vector):
    assert f"VECTOR={vector}" in plan(**changes).defines


def test_plan_stays_within_the_limits_of_a_launch():
    for changes in (
        {"batch": 65537, "grid": (2, 2), "window": (1, 1), "pool": (1, 1)},
        {"batch": 65537},
        {"batch": 1, "heads": 1, "grid": (2**15, 2**15), "window": None},
        {"batch": 1, "heads": 1, "grid": (1, 2**30), "window": (1, 1), "pool": None},
        {"batch": 1, "heads": 1, "grid": (1, 1), "window": (1, 1), "pool": None},
        {"multiprocessors": 1},
        {"multiprocessors": 10**5},
    ):
        p = plan(**changes)
        for launch in filter(None, (p.pool, p.attend)):
            assert 0 < launch.grid[0] < 2**31
            assert launch.grid[1:] == (1, 1)
            assert launch.block[0] in range(32, 257, 32)
    for width, gated in itertools.product(range(1, MAX_WIDTH + 1), (False, True)):
        assert plan(width=width, gated=gated).attend.shared_bytes <= 99 * 1024


@pytest.mark.parametrize(
    ("module", "shape", "grid", "window", "pool", "says"),
    [
        (cuda_impl, (2, 3, 16, 256), (4, 4), (2, 2), (2, 2), ()),
        (cuda_impl, (2, 3, 16, 257), (4, 4), (2, 2), (2, 2), ("q has heads of width 257; the cuda backend", "256")),
        (cuda_impl, (1, 1, 2**30, 1), (4, 2**28), (2, 2), None, ()),
        (cuda_impl, (1, 1, 2**30 + 4, 1), (4, 2**28 + 1), (2, 2), None, ("q has 1073741828 tokens of width 1 in",)),
        (cuda_impl, (2**28, 3, 16, 8), (4, 4), (2, 2), (2, 2), ("q has 268435456 samples of 3 heads, which take",)),
        (cuda_impl, (2**25, 1, 64, 200), (4, 16), None, (1, 1), ("which take",)),
        (cuda_impl, (0, 3, 16, 8), (4, 4), (2, 2), (2, 2), ()),
        (cuda_impl, (65537, 8, 64, 8), (4, 16), (2, 2), None, ()),
        (triton_impl, (1, 2, 4, 512), (2, 2), (1, 1), (1, 1), ()),
        (triton_impl, (1, 2, 4, 513), (2, 2), (1, 1), (1, 1), ("q", "512", "513")),
        (triton_impl, (1, 1, 2**31 - 1, 1), (1, 2**31 - 1), (1, 1), None, ()),
        (triton_impl, (1, 1, 2**31, 1), (2**16, 2**15), (1, 1), None, ("q", str(2**31 - 1), str(2**31))),
        (triton_impl, (2**27, 16, 1, 1), (1, 1), None, (1, 1), ("q", str(2**31 - 1), str(2**31))),
        (triton_impl, (2**15, 1, 2**16, 1), (2**8, 2**8), (16, 16), (4, 4), ()),
        (triton_impl, (2**15, 1, 2**16, 1), (2**8, 2**8), (16, 16), (1, 1), ("q", str(2**31 - 1), str(2**31))),
        (triton_impl, (0, 1, 4, 1), (2, 2), (1, 1), None, ()),
    ],
)
def test_more_than_a_launch_has_is_refused(module, shape, grid, window, pool, says):
    def given(device: str) -> tuple[Any, ...]:
        q = torch.empty(shape, device=device, dtype=torch.float16)
        return q, q, q, grid, window, pool, "joint", False, None, None

    with FakeTensorMode():
        sentence = module.reject(*given("cuda"))
    assert (sentence is not None) == bool(says)
    assert all(words in sentence for words in says)
    if module is triton_impl and says:
        assert "backend='reference'" in sentence
    elif module is triton_impl:
        q, *others = given("meta")
        steps = [*triton_impl.launches(q, *others)[1], *triton_backward.steps(q, q, *others)[1]]
        programs = [step.grid[0] for step in steps if isinstance(step, triton_impl.Launch)]
        assert max(programs, default=0) < 2**31


@pytest.mark.parametrize("dtype", INTERPRETER.dtypes, ids=str)
def test_small_tiles_take_the_paths_of_large_maps(dtype):
    with interpreter.small_tiles("gri_attention"):
        launched = [
            launch
            for name, sample in covering.samples(op, "cpu", dtype).items()
            if name in INTERPRETER.served(op, {name: sample})
            for launch in INTERPRETER.launches(op, sample)
        ]
    pool, attend = (
        [arguments(launch) for launch in launched if launch.kernel.__name__ == name]
        for name in ("pool_cells", "attend")
    )
    assert all((a["BLOCK_M"], a["BLOCK_N"]) == (16, 16) for a in attend)
    # cells are added up in steps, the last of which is not full
    assert any((a["pool_height"] * (a["CELL_WIDTH"] or a["grid_width"])) % a["BLOCK_T"] for a in pool)
    assert any(a["pool_height"] * (a["CELL_WIDTH"] or a["grid_width"]) > 2 * a["BLOCK_T"] for a in pool)
    for gated, masked in itertools.product((False, True), repeat=2):
        assert any(
            a["REGIONS"]
            and (a["gate_ptr"] is not None, a["MASK_OWN_WINDOW"]) == (gated, masked)
            # several windows of several tiles; those at the edge have fewer, and the last is not full
            and a["windows"] > a["window_columns"] > 1
            and a["tiles"] > a["grid_height"] % a["window_height"] * a["WINDOW_WIDTH"] // 16 + 1
            and a["window_height"] * a["WINDOW_WIDTH"] % 16
            # several tiles of cells; where the window is masked, one lies in it as a whole
            and a["cells"] > 2 * 16
            and a["cells"] % 16
            and a["pool_height"] == a["pool_width"] == 1
            and a["WINDOW_WIDTH"] > 16
            for a in attend
        )


def test_the_interpreter_refuses_bfloat16():
    with pytest.raises(BackendUnavailable, match=r"bfloat16.*TRITON_INTERPRET"):
        INTERPRETER.launches(op, sample_of("contiguous", torch.bfloat16))


def check_gradient(sample: Sample, gradients, twice: bool) -> None:
    """Hold what ``gradients(grad, *inputs)`` returns to the rule of the contract, and, ``twice``, to the same bits.

    Some of the gradients cancel to nothing, so the floor is that of the largest.
    """
    given = in_full(sample)
    q, dtype = given["q"], given["q"].dtype
    upstream = random_tensor(tuple(q.shape), q.device, dtype, seed=5)
    if sample.name == "layouts_that_differ":
        upstream = upstream[:1, :1].expand(q.shape)  # of a loss that is a sum over samples and heads
    names = [name for name in ("q", "k", "v", "gate") if given[name] is not None]

    def of_reference(dtype: torch.dtype) -> list[Tensor]:
        inputs = {name: given[name].to(dtype).detach().requires_grad_() for name in names}
        y = reference.gri_attention(**given | inputs)
        result = torch.autograd.grad(y, list(inputs.values()), upstream.to(dtype), allow_unused=True)
        # a window that is the map leaves the gate unused
        return [torch.zeros_like(given[n]) if g is None else g for n, g in zip(names, result, strict=True)]

    actual = [g for g in gradients(upstream, *given.values()) if g is not None]
    again = [g for g in gradients(upstream, *given.values()) if g is not None] if twice else actual
    exact, plain = of_reference(torch.float64), of_reference(dtype)
    largest = max((g[g.isfinite()].abs().max().item() for g in exact if g.numel()), default=0.0)
    floor = FLOOR_ULPS * torch.finfo(dtype).eps * largest
    for name, of, a, b, e, p in zip(names, map(given.get, names), actual, again, exact, plain, strict=True):
        assert (a.shape, a.dtype) == (of.shape, of.dtype), name
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        finite = e.isfinite()
        assert torch.equal(a.isfinite(), finite), name
        if finite.any():
            error, plain_error = ((g - e)[finite].abs().max().item() for g in (a, p))
            assert error <= 2 * plain_error + floor, name


def gradient_sample(name: str, dtype: torch.dtype) -> Sample:
    if name == "layouts_that_differ":
        layouts = {"q": "token_major", "k": "expanded_heads", "v": "strided_width"}
        mixed = {x: sample_of(layout, dtype).kwargs[x] for x, layout in layouts.items()}
        return Sample(name, sample_of("packed", dtype).kwargs | mixed)
    if name == "key_of_minus_infinity":
        # 9 queries in a tile of 16
        q, k, v = tokens(1, 2, 9, 4, "contiguous", device="cpu", dtype=dtype)
        k[0, 1, 4] = -torch.inf
        return Sample(name, {"q": q.abs(), "k": k, "v": v, "grid": (3, 3), "window": (3, 3), "pool": None})
    return sample_of(name, dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(
            (name, torch.float32)
            for name in (
                "three_heads",
                "width_40",
                "ragged_masked",
                "oblong_gated_masked",
                "one_cell_gated",
                "window_is_the_map_gated",
                "only_cells",
                "only_regions",
                "one_token",
                "large_scores",
                "gate_of_another_dtype",
                "empty_batch",
                "layouts_that_differ",
                "key_of_minus_infinity",
            )
        ),
        ("ragged_gated", torch.float16),
    ],
    ids=str,
)
def test_gradient(name, dtype):
    fused = triton_backward.gradients
    check_gradient(gradient_sample(name, dtype), lambda *args: interpreter.interpreted(fused, *args), twice=False)


@pytest.mark.parametrize(("name", "splits"), [("packed", 1), ("oblong_gated_masked", 2), ("only_cells", 1)])
def test_gradient_in_few_programs(name, splits):
    """With enough for a card each sample has a program for every tile of queries of its cells; here it has several."""
    few, fused = {f"{triton_backward.__name__}.FEWEST_PROGRAMS": 4}, triton_backward.gradients
    given = in_full(sample_of(name, torch.float32)).values()
    _, steps = interpreter.with_constants(
        few, triton_backward.steps, sample_of(name, torch.float32).kwargs["q"], *given
    )
    cells = next(a for a in map(arguments, steps) if a.get("STEP") == 3)
    assert cells["splits"] == splits < cells["grid_height"] * cells["grid_width"] // cells["BLOCK"]
    check_gradient(
        sample_of(name, torch.float32),
        lambda *args: interpreter.interpreted(interpreter.with_constants, few, fused, *args),
        twice=splits > 1,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradient_on_a_card(dtype):
    for sample in (
        *covering.samples(op, "cuda", dtype).values(),
        *op.cases.large_samples("cuda", dtype),
        *(sample for size in UNETS for sample in of_unets(dtype, size)),
    ):
        if is_finite(sample) and triton_backward.reject(*in_full(sample).values()) is None:
            check_gradient(sample, triton_backward.gradients, twice=True)


@pytest.mark.parametrize(
    ("interaction", "twice", "width", "calls"),
    [("gated", False, 4, 1), ("agent", False, 4, 0), ("joint", True, 4, 0), ("joint", False, 257, 0)],
)
def test_the_op_takes_this_gradient(interaction, twice, width, calls):
    """Where Triton serves; not for "agent", for rows too wide, nor for a gradient that is itself differentiated."""
    fused, called = triton_backward.gradients, []
    wanted = [torch.randn(1, 1, 6, width, requires_grad=True) for _ in range(3)]
    wanted += [torch.randn(1, requires_grad=True)] if interaction == "gated" else []
    q, k, v, gate = (*wanted, None)[:4]

    def gradients(*args):
        called.append(args)
        with attributes((triton_backward, "gradients", fused)):  # the child finds it by its name
            return interpreter.interpreted(fused, *(x.detach() if isinstance(x, Tensor) else x for x in args))

    with attributes(
        (triton_runtime, "INTERPRETED", True),
        (triton_impl, "unavailable", lambda: None),
        (triton_impl, "run", reference.run),
        (triton_backward, "gradients", gradients),
    ):
        given = {"grid": (2, 3), "window": 2, "pool": 2, "interaction": interaction, "gate": gate}
        y = gri_attention(q, k, v, **given, backend="triton")
        actual = torch.autograd.grad(y.square().sum(), wanted, create_graph=twice)
    y = reference.gri_attention(q, k, v, (2, 3), (2, 2), (2, 2), interaction, False, gate, None)
    for a, b in zip(actual, torch.autograd.grad(y.square().sum(), wanted), strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()
    assert len(called) == calls


def ttir(launch) -> str:
    """A kernel in Triton's first form, before any pass."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target, context = launch.kernel, GPUTarget("cuda", 80, 32), ir.context()
    backend = make_backend(target)
    _, kinds, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(*launch.args)
    signature = {name: kind for name, (kind, _) in zip(kernel.arg_names, kinds, strict=True)}
    constants = {name: value for name, value in arguments(launch).items() if signature[name] == "constexpr"}
    options = backend.parse_options({"num_warps": launch.num_warps})
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    source = ASTSource(kernel, signature, constants)
    return str(source.make_ir(target, options, functions, backend.get_module_map(), context))


def test_gradient_of_a_gate_on_the_largest_maps():
    """The statistics of the second softmax begin at twice ``plane``, which 32 bits may not hold."""
    q = torch.empty(1, 1, 2**30, 1, device="meta", dtype=torch.float16)
    steps = triton_backward.steps(q, q, q, q, (2**15, 2**15), (8, 8), (8, 8), "gated", False, q.new_empty(1), None)[1]
    gradients = [step for step in steps if isinstance(step, triton_impl.Launch) and "STEP" in step.kernel.arg_names]
    assert len(gradients) == 4
    for launch in gradients:
        text = ttir(launch)
        assert re.search(r"%plane\b", text)
        assert not re.search(r"arith\.(muli|addi) .*%plane\b.* : i32", text)


@pytest.mark.parametrize(
    ("dtype", "width", "interaction", "words"),
    [
        (torch.float32, 256, "joint", None),
        (torch.float16, 512, "gated", None),
        (torch.float32, 257, "joint", ("q", "256", "257", "float32", "reference")),
        (torch.float32, 8, "agent", ("agent", "reference")),
    ],
    ids=str,
)
def test_refused_gradients(dtype, width, interaction, words):
    q = torch.empty(1, 1, 16, width, dtype=dtype, device="meta")
    given = (q, q, q, (4, 4), (2, 2), (2, 2), interaction, False, None if interaction != "gated" else q[0, 0, :1, 0])
    sentence = triton_backward.reject(*given, None)
    assert (sentence is None) == (words is None)
    if words is not None:
        assert all(word in sentence for word in words)
        with pytest.raises(NotImplementedError, match=re.escape(sentence)):
            triton_backward.gradients(q, *given, None)
