"""attention in Triton: interpreted on the CPU, compiled for cards that are not here, and run on one that is."""

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastsd_kernels import attention
from fastsd_kernels.attention import cases, op
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.testing import Sample, check_op, named
from fastsd_kernels.testing.inputs import random_tensor
from tests.proving import interpreter

triton_impl = op.backends["triton"].module
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile; unset it", allow_module_level=True)
triton_aot = pytest.importorskip("tests.budgets.triton_aot", reason="Triton is not installed")


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SAMPLES = [sample.name for sample in cases.samples("cpu", torch.float32)]

# With tiles this small a few dozen tokens take the paths of large inputs: several tiles of queries and of keys, tiles
# of keys that are left out whole
SMALL_TILES = {"MOST_M": 32, "MOST_N": 32, "MOST_Q_ELEMENTS": 1, "MOST_K_ELEMENTS": 1}
SMALL_TILE_SAMPLES = (
    "packed",
    "width_40",
    "width_160",
    "65_queries_130_keys",
    "65_queries_130_keys_biased",
    "shared_bias",
    "keys_left_out",
    "nan_all_keys_left_out",
    "large_scores",
    "large_values",
    "nan_in_k",
    "inf_in_v",
)


def sample_launches(sample: Sample):
    """The launches of one call of the public function, its tensors on ``meta``."""
    given = {"bias": None, "scale": None} | sample.map_tensors(lambda tensor: tensor.to("meta")).kwargs
    return triton_impl.launches(**given)[1]


def arguments(launch) -> dict[str, Any]:
    return dict(zip(launch.kernel.arg_names, launch.args, strict=True))


def sample_of(queries: int, keys: int, width: int, batch: int = 1, heads: int = 2, biased: bool = True) -> Sample:
    q, k = (torch.empty(batch, heads, n, width, device="meta", dtype=torch.float16) for n in (queries, keys))
    return Sample("sizes", {"q": q, "k": k, "v": k} | ({"bias": k.new_empty(1, keys)} if biased else {}))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_interpreted(dtype, name):
    failure = interpreter.failures("attention", dtype)[name]
    assert failure is None, failure


@pytest.mark.parametrize("name", SMALL_TILE_SAMPLES)
def test_interpreted_in_small_tiles(name):
    small = tuple(SMALL_TILES.items())
    results = interpreter.failures("attention", "float32", names=SMALL_TILE_SAMPLES, constants=small, twice=True)
    assert results[name] is None, results[name]


def test_small_tiles_take_the_paths_of_large_inputs(monkeypatch):
    for name, value in SMALL_TILES.items():
        monkeypatch.setattr(triton_impl, name, value)
    monkeypatch.setattr(triton_impl, "tile", triton_impl.tile.__wrapped__)
    (launch,) = sample_launches(named(cases.samples("cpu", torch.float32), "keys_left_out"))
    a = arguments(launch)
    assert (a["BLOCK_M"], a["BLOCK_N"], a["tiles"]) == (16, 16, 3)
    # the last tiles are not full, and of the second sample's keys two tiles are left out whole
    assert a["queries"] % a["BLOCK_M"] > 0
    assert a["keys"] % a["BLOCK_N"] > 0
    assert 2 * a["BLOCK_N"] <= 33


def test_least_finite_bias_leaves_no_key_out():
    """A mask of finite numbers is often the least that there is: log2(e) times as much has no place in float32."""
    program = """
        import torch
        from fastsd_kernels import attention
        q, k, v = (torch.randn(2, 1, count, 8, generator=torch.manual_seed(1)) for count in (5, 40, 40))
        bias = torch.zeros(2, 40)
        bias[0] = torch.finfo(torch.float32).min
        bias[1, 3:] = torch.finfo(torch.float32).min
        y, expected = (attention(q, k, v, bias=bias, backend=backend) for backend in ("triton", "reference"))
        print((y - expected).abs().max().item())
    """
    child = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(program)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert float(child.stdout) < 1e-5


def test_interpreter_refuses_bfloat16():
    failure = interpreter.failures("attention", "bfloat16", names=("contiguous",))["contiguous"]
    for words in ("BackendUnavailable", "bfloat16", "TRITON_INTERPRET"):
        assert words in failure


@pytest.mark.parametrize("width", [1, 15, 16, 17, 31, 33, 40, 48, 63, 64, 80, 96, 97, 160, 200, 511, 512])
def test_parts_hold_a_row(width):
    parts = triton_impl.parts(width)
    for part in parts:
        assert part is None or (part >= 16 and part & (part - 1) == 0)
    assert width <= parts.padded
    assert parts.padded - width < 16 or parts.padded < 1.5 * width
    # no mask hides a part of the main part where there is another
    assert parts.rest is None or parts.main < width


@pytest.mark.parametrize(("width", "padded"), [(40, 48), (64, 64), (80, 80), (160, 160)])
def test_widths_of_stable_diffusion_are_hardly_padded(width, padded):
    assert triton_impl.parts(width).padded == padded


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [1, 40, 64, 160, 512])
@pytest.mark.parametrize("tokens", [1, 17, 64, 256, 1 << 20])
def test_tiles_are_such_as_tensor_cores_multiply(tokens, width, itemsize):
    tile = triton_impl.tile(tokens, tokens, width, itemsize)
    for size in (tile.block_m, tile.block_n, tile.num_warps):
        assert size & (size - 1) == 0
    assert min(tile.block_m, tile.block_n) >= 16
    assert 1 <= tile.num_warps <= 16


def test_large_batches_stay_on_the_one_long_grid_axis():
    for sample in cases.large_samples("meta", torch.float16):
        for launch in sample_launches(sample):
            (programs,) = launch.grid
            assert 2 * 65_537 <= programs < 2**31


def test_nothing_is_copied_but_rows_of_scattered_elements():
    (launch,) = sample_launches(named(cases.samples("meta", torch.float16), "packed"))
    for x in launch.args[:3]:
        assert x.stride() == (33 * 3 * 2 * 8, 8, 3 * 2 * 8, 1)
    (launch,) = sample_launches(named(cases.samples("meta", torch.float16), "strided_width"))
    assert launch.args[0].is_contiguous()


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [((1, 20), (20, 1), (0, 1)), ((3, 20), (20, 1), (20, 1)), ((3, 20), (0, 1), (0, 1)), ((3, 20), (1, 3), (1, 3))],
    ids=str,
)
def test_a_bias_is_read_where_it_is(shape, strides, expected):
    sample = sample_of(9, 20, 8, batch=3, biased=False)
    bias = torch.empty_strided(shape, strides, device="meta")
    (launch,) = sample_launches(Sample("biased", sample.kwargs | {"bias": bias}))
    a = arguments(launch)
    assert (a["bias_batch"], a["bias_key"]) == expected


def test_empty_results_need_no_launch():
    for name in ("empty_batch", "no_heads", "no_queries"):
        assert not sample_launches(named(cases.samples("cpu", torch.float32), name))


@pytest.mark.parametrize("name", ["contiguous", "1_queries_1_keys_biased", "shared_bias", "expanded_bias", "width_33"])
def test_ahead_of_time_specialisation_is_tritons_own(name):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    for launch in sample_launches(named(cases.samples("cpu", torch.float16), name)):
        ours = triton_aot.specialise(launch.kernel, launch.args)
        bind = create_function_from_signature(
            launch.kernel.signature, launch.kernel.params, make_backend(GPUTarget("cuda", 80, 32))
        )
        _, theirs, _ = bind(*launch.args)
        assert list(ours.signature.values()) == [kind for kind, _ in theirs]
        for argument, (kind, key) in zip(launch.kernel.arg_names, theirs, strict=True):
            if kind != "constexpr":
                assert (argument in ours.divisible_by_16) == ("D" in (key or ""))


@pytest.mark.parametrize(
    ("shape", "keys", "refused"),
    [
        ((1, 1, 2**30, 1), 1, None),
        ((1, 1, 2**30 + 1, 1), 1, ("q", str(2**30), str(2**30 + 1))),
        ((1, 1, 1, 1), 2**30, None),
        ((1, 1, 1, 1), 2**30 + 1, ("k", str(2**30), str(2**30 + 1))),
        ((2**27, 15, 1, 1), 1, None),
        ((2**27, 16, 1, 1), 1, ("q", str(2**31 - 1), str(2**31))),
        ((0, 1, 4, 1), 4, None),
    ],
    ids=str,
)
def test_more_than_a_launch_has_is_refused(shape, keys, refused):
    q = torch.empty(shape, device="meta", dtype=torch.float16)
    k = q.new_empty((*shape[:2], keys, shape[3]))
    most = max((launch.grid[0] for launch in triton_impl.launches(q, k, k, None, None)[1]), default=0)
    with FakeTensorMode():
        q, k = (torch.empty(x.shape, device="cuda", dtype=x.dtype) for x in (q, k))
        sentence = triton_impl.reject(q, k, k, None, None)
    assert (sentence is not None) == (refused is not None)
    if refused is None:
        assert most < 2**31
    else:
        for word in (*refused, "backend='reference'"):
            assert word in sentence


@pytest.mark.parametrize(
    ("dtype", "width", "bias", "words"),
    [
        (torch.float64, 8, None, ("q", "float16, bfloat16 or float32", "torch.float64", "backend='reference'")),
        (torch.float16, 8, torch.float8_e5m2, ("bias", "float64", "torch.float8_e5m2", "cast")),
        (torch.float16, 513, None, ("q", "512", "513", "backend='reference'")),
        (torch.float16, 8, None, ("q", "GPU", "cpu", "backend='cpu'")),
    ],
    ids=("float64", "float8_bias", "wide", "on_the_cpu"),
)
def test_refusals(dtype, width, bias, words):
    q = torch.ones(1, 2, 4, width, dtype=dtype)
    sentence = triton_impl.reject(q, q, q, None if bias is None else torch.ones(1, 4).to(bias), None)
    for word in words:
        assert word in sentence


def test_forced_on_the_cpu():
    q = torch.ones(1, 2, 4, 8)
    with pytest.raises(BackendUnavailable, match=r"'triton' cannot be used: .*GPU.*backend='cpu'"):
        attention(q, q, q, backend="triton")


def test_missing_triton_is_a_refusal():
    program = """
        import sys
        sys.modules["triton"] = None
        import torch
        from fastsd_kernels.attention import op
        print(op.backends["triton"].reject(torch.ones(1, 2, 4, 8)))
    """
    child = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(program)], capture_output=True, text=True, check=True
    )
    assert "pip install triton" in child.stdout


def device_samples(dtype: torch.dtype) -> Iterator[Sample]:
    """The samples of the contract, and the attention of U-Nets and of autoencoders."""
    like: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    yield from cases.samples("cuda", dtype)
    yield from cases.large_samples("cuda", dtype)
    for heads, width, side in ((8, 40, 64), (10, 64, 64), (8, 80, 32), (8, 160, 16), (8, 160, 8), (1, 512, 32)):
        q, k, v = cases.tokens(2, heads, side * side, width, "packed", **like)
        yield Sample(f"{heads}x{width}_{side}", {"q": q, "k": k, "v": v})
        k, v = (cases.in_heads(2, heads, 77, width, "token_major", **like, seed=seed) for seed in (2, 3))
        yield Sample(f"{heads}x{width}_{side}_to_77", {"q": q, "k": k, "v": v})
        bias = random_tensor((2, 77), **like, seed=4)
        bias[:, 50:] = -torch.inf
        yield Sample(f"{heads}x{width}_{side}_to_77_biased", {"q": q, "k": k, "v": v, "bias": bias})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_device(dtype):
    for sample in device_samples(dtype):
        try:
            check_op(op, sample, "triton")
            first, second = (attention(**sample.kwargs, backend="triton") for _ in range(2))
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
        except Exception as error:
            raise AssertionError(f"{sample}: {error}") from error
