"""What is particular to attention: sizes where its backends cut the work otherwise, how they cut it, exact results."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastsd_kernels import attention, cuda_runtime
from fastsd_kernels.attention import cuda_impl, op
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.testing import Sample
from fastsd_kernels.testing.inputs import random_tensor
from fastsd_kernels.testing.tokens import LAYOUTS, in_heads, tokens
from tests.contract import covering
from tests.contract.check import check, check_all, check_threads
from tests.runners import RUNNERS, host, interpreter

CPU, HOST, INTERPRETER = RUNNERS["cpu"], RUNNERS["host"], RUNNERS["interpreter"]
triton_impl = op.backends["triton"].module

# heads, queries, keys, width: several tasks of queries, many steps of keys, keys that are copied for many queries, rows
# so wide that a task meets its keys several times
SIZES = {
    "text": (2, 4096, 77, 40),
    "square": (2, 1031, 1031, 40),
    "many_keys": (2, 40, 4096, 64),
    "deep": (2, 256, 256, 160),
    "autoencoder": (1, 1024, 1024, 512),
}
# What the samples are too small for: queries, keys, width, layout, whether there is a bias; how a card of one
# multiprocessor must cut it
CUTS: dict[str, tuple[int, int, int, str, bool, set[str]]] = {
    "several_tiles": (130, 150, 40, "token_major", True, {"WARPS=4", "KEYS=64", "VECTOR=8"}),
    "whole_tiles": (128, 128, 64, "packed", False, {"WARPS=4", "KEYS=64", "VECTOR=8"}),
    "text": (70, 77, 40, "token_major", True, {"WARPS=4", "KEYS=80", "VECTOR=8"}),
    "wider_text": (40, 77, 80, "token_major", False, {"WARPS=4", "KEYS=80", "VECTOR=8"}),
    "longest_tile": (20, 80, 64, "contiguous", True, {"WARPS=2", "KEYS=80"}),
    "beyond_one_tile": (20, 81, 64, "contiguous", True, {"WARPS=2", "KEYS=64"}),
    "wide": (66, 70, 160, "contiguous", False, {"WARPS=4", "KEYS=32"}),
    "wide_text": (33, 77, 160, "contiguous", True, {"WARPS=4", "KEYS=32"}),
    "widest": (33, 40, 256, "contiguous", False, {"WARPS=4", "KEYS=16"}),
    "quarter_pieces": (40, 90, 100, "token_major", True, {"WARPS=4", "KEYS=32", "VECTOR=4"}),
    "pairs": (40, 90, 6, "contiguous", False, {"WARPS=4", "KEYS=64", "VECTOR=2"}),
}
# Of U-Nets at 512² and 1024², and of an autoencoder: heads, width of a head, side of the map
UNETS = ((8, 40, 64), (5, 64, 64), (10, 64, 64), (8, 80, 32), (20, 64, 32), (8, 160, 16), (8, 160, 8), (1, 512, 32))


def of_size(heads, queries, keys, width, layout="token_major", biased=False, dtype=torch.float16, batch=1) -> Sample:
    like: dict[str, Any] = {"device": "cpu", "dtype": dtype}
    if layout == "packed":
        given = dict(zip("qkv", tokens(batch, heads, queries, width, layout, **like), strict=True))
    else:
        sizes = {"q": queries, "k": keys, "v": keys}
        given = {of: in_heads(batch, heads, n, width, layout, **like, seed=ord(of)) for of, n in sizes.items()}
    return Sample("of_size", given | ({"bias": random_tensor((batch, keys), **like, seed=4)} if biased else {}))


def cut(name: str, dtype=torch.float16) -> Sample:
    return of_size(2, *CUTS[name][:5], dtype)


def sample_of(name: str, dtype=torch.float16) -> Sample:
    return covering.samples(op, "cpu", dtype)[name]


def arguments(sample: Sample) -> dict[str, Any]:
    (launch,) = INTERPRETER.launches(op, sample)
    return dict(zip(launch.kernel.arg_names, launch.args, strict=True))


def settings_of(runner) -> list[tuple[torch.dtype, dict[str, Any]]]:
    """Of each dtype that the backend takes."""
    dtypes = cuda_impl.DTYPES if runner is HOST else runner.dtypes
    values = itertools.product(*runner.settings.values())
    return [(dtype, dict(zip(runner.settings, value, strict=True))) for value in values for dtype in dtypes]


@pytest.fixture
def one_multiprocessor(monkeypatch):
    monkeypatch.setattr(host, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(cuda_runtime, "multiprocessors", lambda device: 1)


@pytest.mark.parametrize("name", ["width_40", "64_queries_77_keys", "65_queries_130_keys_biased", "own_scale"])
def test_reference_against_torch(name):
    given = sample_of(name, torch.float64).kwargs
    q, k, v, bias = (given.get(key) for key in ("q", "k", "v", "bias"))
    mask = None if bias is None else bias[:, None, None].double()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=given.get("scale"))
    torch.testing.assert_close(attention(**given, backend="reference"), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_heads_of_packed_projections_lie_side_by_side(backend):
    y = attention(**sample_of("packed", torch.float32).kwargs, backend=backend)
    assert y.transpose(1, 2).flatten(2).data_ptr() == y.data_ptr()


def test_the_gradient_of_a_bias_that_samples_share():
    given = sample_of("shared_bias", torch.float64).kwargs
    q, k, v, bias = (given[name].detach().requires_grad_() for name in ("q", "k", "v", "bias"))
    assert torch.autograd.gradcheck(lambda *x: attention(*x[:3], bias=x[3]), (q, k, v, bias), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_on_the_cpu(name, dtype):
    check_threads(op, CPU, of_size(*SIZES[name], dtype=dtype))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "strided_width"])
def test_keys_and_values_that_are_copied_on_the_cpu(layout):
    """Many queries read those of a head side by side, wherever they lie; each sample and head its own."""
    q, k, v = tokens(2, 3, 1031, 9, layout, device="cpu", dtype=torch.float32)
    for keys in (140, 5):
        k_end, v_begin = k[:, :, -keys:], v[:, :, :keys]
        check_threads(op, CPU, Sample(layout, {"q": q, "k": k_end, "v": v_begin}))
        # one of the two lies so already
        check_threads(op, CPU, Sample(layout, {"q": q, "k": k_end.contiguous(), "v": v_begin}))


@pytest.mark.parametrize("runner", [CPU, HOST], ids=lambda runner: runner.name)
@pytest.mark.parametrize("by", ["k", "bias"])
def test_each_key_in_turn_has_all_the_weight(by, runner):
    """Behind the first block of keys too, and a score that underflows counts nothing."""
    wanted = torch.tensor([0, 29, 127, 128, 129, 255, 256, 359])
    for dtype, setting in settings_of(runner):
        if dtype == torch.bfloat16:
            continue  # has no 257
        k, bias = torch.zeros(8, 1, 360, 4, dtype=dtype), torch.zeros(8, 360, dtype=dtype)
        if by == "k":
            k[range(8), 0, wanted] = 250.0
        else:
            bias[:] = -torch.inf
            bias[range(8), wanted] = 3.0
        v = torch.arange(360.0).to(dtype)[:, None].expand(8, 1, 360, 4)
        given = {"q": torch.ones(8, 1, 33, 4, dtype=dtype), "k": k, "v": v, "bias": bias, "scale": 1.0}
        y = runner.run(op, Sample("one_key", given), setting)
        assert torch.equal(y, wanted.to(dtype)[:, None, None, None].expand_as(y))


@pytest.mark.parametrize("runner", [CPU, INTERPRETER, HOST], ids=lambda runner: runner.name)
def test_the_lowest_bias_leaves_no_key_out(runner):
    """A mask of finite numbers is often the least that there is: log2(e) times as much has no place in float32."""
    bias = torch.full((2, 130), torch.finfo(torch.float32).min)
    bias[1, :3] = 0.0
    for dtype, setting in settings_of(runner):
        given = of_size(1, 17, 130, 8, dtype=dtype, batch=2).kwargs | {"bias": bias}
        exact = attention(**{name: x.double() for name, x in given.items()}, backend="reference")
        close = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps}
        torch.testing.assert_close(runner.run(op, Sample("lowest", given), setting).double(), exact, **close)


def test_no_keys_are_refused_on_the_cpu():
    q = torch.randn(1, 2, 16, 4)
    with pytest.raises(ValueError, match="at least one token"):
        torch.ops.fastsd_cpu.attention.default(q, q[:, :, :0], q[:, :, :0], None, 1.0, 0, torch.empty_like(q))


@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize("name", CUTS)
def test_cuts(name):
    (launch,) = HOST.launches(op, cut(name))
    assert CUTS[name][-1] <= set(launch["defines"])
    check(op, HOST, cut(name), {"seed": 0})


@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize("name", ["tiles_left_out", "nan_in_q", "inf_in_bias"])
def test_samples_in_blocks_of_several_warps(name):
    (launch,) = HOST.launches(op, sample_of(name))
    assert "WARPS=1" not in launch["defines"]
    check(op, HOST, sample_of(name), {"seed": 0})


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


@pytest.mark.gpu
@pytest.mark.parametrize("size", UNETS, ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sizes_of_unets_on_a_card(dtype, backend, size):
    heads, width, side = size
    if backend == "cuda" and (dtype == torch.float32 or width > cuda_impl.MAX_WIDTH):
        return
    for keys, layout, biased in ((side**2, "packed", False), (77, "token_major", False), (77, "token_major", True)):
        sample = of_size(heads, side**2, keys, width, layout, biased, dtype, batch=2)
        if biased:
            sample.kwargs["bias"][:, 50:] = -torch.inf
        check(op, RUNNERS[f"card-{backend}"], sample.map_tensors(Tensor.cuda), {})


def test_projections_are_read_where_they_are():
    given = sample_of("packed").kwargs
    (launch,) = HOST.launches(op, sample_of("packed"))
    a = arguments(sample_of("packed"))
    for name, x in zip("qkv", launch["args"], strict=False):
        assert x.data_ptr() == a[f"{name}_ptr"].data_ptr() == given[name].data_ptr()
        assert a[f"{name}_ptr"].stride() == given[name].stride()
    assert "VECTOR=8" in launch["defines"]
    assert arguments(sample_of("strided_width"))["q_ptr"].is_contiguous()


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [((1, 20), (20, 1), (0, 1)), ((3, 20), (20, 1), (20, 1)), ((3, 20), (0, 1), (0, 1)), ((3, 20), (1, 3), (1, 3))],
    ids=str,
)
def test_a_bias_is_read_where_it_is(shape, strides, expected):
    given = of_size(2, 9, 20, 8, batch=3).kwargs
    a = arguments(Sample("biased", given | {"bias": torch.empty_strided(shape, strides)}))
    assert (a["bias_batch"], a["bias_key"]) == expected


@pytest.mark.parametrize(
    ("layout", "vector"),
    [("contiguous", 8), ("packed", 8), ("expanded_heads", 8), ("strided_width", 8), ("storage_offset", 1)],
)
def test_accesses_are_as_wide_as_strides_and_addresses_allow(layout, vector):
    (launch,) = HOST.launches(op, sample_of(layout))
    assert f"VECTOR={vector}" in launch["defines"]


def plan(**changes):
    """The plan of Stable Diffusion 1.5's largest map at 512²."""
    usual = {"batch": 2, "heads": 8, "width": 40, "queries": 4096, "keys": 4096, "dtype": torch.float16}
    return cuda_impl.plan(**usual | {"alignment": 16, "multiprocessors": host.MULTIPROCESSORS} | changes)


@pytest.mark.parametrize(("heads", "width", "side"), [size for size in UNETS if size[1:] not in ((160, 8), (512, 32))])
def test_plan_fills_the_card_with_the_largest_blocks_and_16_byte_accesses(heads, width, side):
    for batch, text in itertools.product((1, 2), (False, True)):
        p = plan(batch=batch, heads=heads, width=width, queries=side**2, keys=77 if text else side**2)
        assert "VECTOR=8" in p.defines
        assert ("KEYS=80" in p.defines) == (text and width <= 80)
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
        {"batch": 65537},
        {"batch": 65537, "queries": 1},
        {"batch": 1, "heads": 1, "width": 1, "queries": 2**30},
        {"batch": 1, "heads": 1, "width": 1, "keys": 2**30},
        {"batch": 1, "heads": 1, "queries": 1, "keys": 1},
        {"multiprocessors": 1},
        {"multiprocessors": 10**5},
    ):
        attend = plan(**changes).attend
        assert 0 < attend.grid[0] < 2**31
        assert attend.grid[1:] == (1, 1)
        assert attend.block[0] in (32, 64, 128)
    for width, keys in itertools.product(range(1, cuda_impl.MAX_WIDTH + 1), (1, 77, 4096)):
        assert plan(width=width, keys=keys).attend.shared_bytes <= 99 * 1024


def test_one_tile_of_keys_takes_the_room_of_one(one_multiprocessor):
    (one,), (two,) = (HOST.launches(op, cut(name)) for name in ("longest_tile", "beyond_one_tile"))
    # 32 queries; rows of 64 + 8 elements of 2 bytes, and 4 bytes of bias
    assert one["shared_bytes"] == (32 + 2 * 80) * 144 + 4 * 80
    assert two["shared_bytes"] == (32 + 4 * 64) * 144 + 4 * 128


@pytest.mark.parametrize(
    ("module", "shape", "keys", "says"),
    [
        (cuda_impl, (2, 3, 16, 256), 16, ()),
        (cuda_impl, (2, 3, 16, 257), 16, ("q has heads of width 257; the cuda backend takes up to 256", "'triton'")),
        (cuda_impl, (1, 1, 2**30, 1), 16, ()),
        (cuda_impl, (1, 1, 2**30 + 1, 1), 16, ("q has 1073741825 tokens of width 1 in each head; the",)),
        (cuda_impl, (1, 1, 1, 1), 2**30, ()),
        (cuda_impl, (1, 1, 1, 2), 2**30, ("k has 1073741824 tokens of width 2 in each head; the",)),
        (cuda_impl, (715_827_883, 3, 16, 8), 16, ("q has 715827883 samples of 3 heads, which take",)),
        (cuda_impl, (2**25, 1, 1024, 8), 16, ("which take",)),
        (cuda_impl, (0, 3, 16, 8), 16, ()),
        (cuda_impl, (65537, 8, 64, 8), 16, ()),
        (triton_impl, (1, 2, 4, 512), 4, ()),
        (triton_impl, (1, 2, 4, 513), 4, ("q", "512", "513")),
        (triton_impl, (1, 1, 2**30, 1), 1, ()),
        (triton_impl, (1, 1, 2**30 + 1, 1), 1, ("q", str(2**30), str(2**30 + 1))),
        (triton_impl, (1, 1, 1, 1), 2**30, ()),
        (triton_impl, (1, 1, 1, 1), 2**30 + 1, ("k", str(2**30), str(2**30 + 1))),
        (triton_impl, (2**27, 15, 1, 1), 1, ()),
        (triton_impl, (2**27, 16, 1, 1), 1, ("q", str(2**31 - 1), str(2**31))),
        (triton_impl, (0, 1, 4, 1), 4, ()),
    ],
)
def test_more_than_a_launch_has_is_refused(module, shape, keys, says):
    with FakeTensorMode():
        q = torch.empty(shape, device="cuda", dtype=torch.float16)
        k = q.new_empty((*shape[:2], keys, shape[3]))
        sentence = module.reject(q, k, k, None, None)
        assert (sentence is not None) == bool(says)
        assert all(words in sentence for words in says)
        if module is triton_impl:
            assert not says or "backend='reference'" in sentence
            steps = triton_impl.launches(q, k, k, None, None)[1]
            assert says or max((launch.grid[0] for launch in steps), default=0) < 2**31


def test_parts_hold_a_row():
    for width in range(1, triton_impl.WIDEST + 1):
        parts = triton_impl.parts(width)
        assert all(part is None or (part >= 16 and part & (part - 1) == 0) for part in parts)
        assert width <= parts.padded
        assert parts.padded - width < 16 or parts.padded < 1.5 * width
        # no mask hides a part of the main part where there is another
        assert parts.rest is None or parts.main < width
    # those of Stable Diffusion
    assert [triton_impl.parts(width).padded for width in (40, 64, 80, 160)] == [48, 64, 80, 160]


def test_tiles_are_such_as_tensor_cores_multiply():
    for count, width, itemsize in itertools.product((1, 17, 64, 256, 1 << 20), (1, 40, 64, 160, 512), (2, 4)):
        tile = triton_impl.tile(count, count, width, itemsize)
        assert all(size & (size - 1) == 0 for size in tile[:3])
        assert min(tile.block_m, tile.block_n) >= 16
        assert 1 <= tile.num_warps <= 16


@pytest.mark.parametrize("dtype", INTERPRETER.dtypes, ids=str)
def test_small_tiles_take_the_paths_of_large_inputs(dtype):
    samples = covering.samples(op, "cpu", dtype)
    with interpreter.small_tiles("attention"):
        launched = {name: arguments(sample) for name, sample in samples.items() if INTERPRETER.launches(op, sample)}
    assert all((a["BLOCK_M"], a["BLOCK_N"]) == (16, 16) for a in launched.values())
    # the last tiles are not full
    assert any(
        a["tiles"] > 2 and a["keys"] > 2 * 16 and a["queries"] % 16 and a["keys"] % 16 for a in launched.values()
    )
    # with a row in one part and in two, with a bias and without
    several = [a for a in launched.values() if a["tiles"] > 1 and a["keys"] > 16]
    assert {(a["REST"] is None, a["bias_ptr"] is None) for a in several} >= {(True, True), (True, False), (False, True)}
    # and whole tiles of keys are left out: the first, one within, and the last
    left_out = samples["tiles_left_out"].kwargs["bias"].isinf()
    whole = torch.stack([tile.all(1) for tile in left_out.split(16, dim=1)])
    assert {tuple(tiles) for tiles in whole.mT[:, [0, 4, -1]].tolist()} >= {(True, False, False), (False, True, True)}


def test_the_interpreter_refuses_bfloat16():
    with pytest.raises(BackendUnavailable, match=r"bfloat16.*TRITON_INTERPRET"):
        INTERPRETER.launches(op, sample_of("contiguous", torch.bfloat16))
