"""What is particular to linear: sizes where its backends cut the work otherwise, how they cut it, and exact results."""

import itertools
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers.activations import QuickGELUActivation

from fastsd_kernels import cuda_runtime, linear
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.linear import cuda_impl, op
from fastsd_kernels.testing import Sample
from fastsd_kernels.testing.inputs import random_tensor
from tests.contract import covering
from tests.contract.check import check, check_all, check_threads
from tests.runners import RUNNERS, host, interpreter

CPU, HOST, INTERPRETER = RUNNERS["cpu"], RUNNERS["host"], RUNNERS["interpreter"]
triton_impl = op.backends["triton"].module

# rows, channels, rows of the weight: on both sides of 512 rows, weights above 12 MB, depths above what a panel holds
SIZES = {
    "many_rows": (1030, 320, 640),
    "rows_of_one_task_more": (625, 96, 70),
    "few_rows": (511, 96, 70),
    "weights_in_two_parts": (520, 1280, 2600),
    "deep": (520, 2600, 66),
    "deep_few_rows": (40, 5200, 66),
    "one_feature": (600, 40, 2),
}
# What the samples are too small for: rows, channels, rows of the weight, activation; the blocks, and how a card of one
# multiprocessor must cut it
CUTS: dict[str, tuple[int, int, int, str, int, set[str]]] = {
    "largest_tile": (250, 72, 248, "none", 4, {"TILE_ROWS=128", "TILE_FEATURES=128", "WARP_FEATURES=64"}),
    "largest_gated_tile": (120, 104, 240, "geglu", 2, {"TILE_ROWS=128", "TILE_FEATURES=64", "WARP_FEATURES=32"}),
    "high_tile": (250, 64, 60, "gelu", 2, {"TILE_ROWS=128", "TILE_FEATURES=64", "WARP_FEATURES=32"}),
    "square_tile": (60, 200, 120, "quick_gelu", 2, {"TILE_ROWS=64", "TILE_FEATURES=64"}),
    "wide_gated_tile": (30, 136, 120, "geglu", 2, {"TILE_ROWS=32", "TILE_FEATURES=32"}),
    "small_tile": (30, 328, 90, "none", 3, {"TILE_ROWS=32", "TILE_FEATURES=32", "OUT_VECTOR=2"}),
    "smallest_tile": (70, 96, 40, "gelu", 9, {"TILE_ROWS=32", "TILE_FEATURES=16", "OUT_VECTOR=8"}),
    "smallest_gated_tile": (70, 96, 80, "geglu", 15, {"TILE_ROWS=32", "TILE_FEATURES=8", "OUT_VECTOR=8"}),
    "single_elements": (90, 75, 66, "geglu", 15, {"VECTOR=1", "OUT_VECTOR=1", "STEP=32"}),
    "short_rows": (90, 12, 66, "geglu", 15, {"VECTOR=4", "STEP=16"}),
    "misaligned_norm": (40, 40, 24, "none", 2, {"VECTOR=8"}),
}
# Projections of U-Nets and text encoders: tokens, channels, features, activation, what surrounds the product
UNETS = (
    (4096, 320, 320, "none", "norm"),
    (4096, 320, 1280, "geglu", "norm"),
    (4096, 1280, 320, "none", "residual"),
    (4096, 640, 640, "gelu", "norm"),
    (1024, 640, 2560, "geglu", "norm"),
    (256, 1280, 1280, "none", "norm"),
    (64, 1280, 5120, "geglu", "norm"),
    (64, 5120, 1280, "none", "residual"),
    (77, 768, 320, "none", "bias"),
    (77, 768, 3072, "quick_gelu", "norm"),
)


def of_size(
    rows: int, channels: int, weights: int, activation: str, around: str = "all", dtype=torch.float16
) -> Sample:
    """``around``: the product, ``"bare"``, ``"bias"``, ``"norm"``, ``"residual"`` or ``"all"`` of them."""
    like: dict[str, Any] = {"device": "cpu", "dtype": dtype}
    x, weight = random_tensor((rows, channels), **like), random_tensor((weights, channels), **like, seed=5)
    given: dict[str, Any] = {"x": x * 2 + 3, "weight": weight * channels**-0.5, "activation": activation}
    if around != "bare":
        given["bias"] = random_tensor((weights,), **like, seed=6)
    if around in ("norm", "all"):
        parameters = {
            f"norm_{name}": random_tensor((channels,), **like, seed=i) for i, name in ((1, "weight"), (2, "bias"))
        }
        given |= {"norm_eps": 1e-5, **parameters}
    if around in ("residual", "all"):
        given["residual"] = random_tensor((rows, weights // 2 if activation == "geglu" else weights), **like, seed=8)
    return Sample("of_size", given)


def cut(name: str, dtype=torch.float16) -> Sample:
    sample = of_size(*CUTS[name][:4], dtype=dtype)
    if name == "misaligned_norm":
        for parameter in ("norm_weight", "norm_bias"):
            sample.kwargs[parameter] = torch.cat([torch.zeros(1), sample.kwargs[parameter]]).to(dtype)[1:]
    return sample


def sample_of(name: str, dtype=torch.float16) -> Sample:
    return covering.samples(op, "cpu", dtype)[name]


def arguments(launch) -> dict[str, Any]:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_reference_is_the_modules_of_a_transformer(dtype):
    torch.manual_seed(0)
    norm, geglu, out = nn.LayerNorm(24).to(dtype), GEGLU(24, 40).to(dtype), nn.Linear(40, 24).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 9, 24, dtype=dtype)
    affine = {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}
    y = linear(x, geglu.proj.weight, geglu.proj.bias, **affine, activation="geglu", backend="reference")
    assert torch.equal(y, geglu(norm(x)))
    z = linear(y, out.weight, out.bias, residual=x, backend="reference")
    assert torch.equal(z, out(y) + x)
    for activation, module in (("gelu", nn.GELU()), ("quick_gelu", QuickGELUActivation())):
        y = linear(x, geglu.proj.weight, geglu.proj.bias, activation=activation, backend="reference")
        assert torch.equal(y, module(geglu.proj(x)))


@pytest.mark.parametrize(
    ("dtype", "activation", "around"),
    [
        (torch.float32, "geglu", "all"),
        (torch.float16, "none", "all"),
        (torch.float32, "none", "bare"),  # rows and all are read where they are
        pytest.param(torch.float32, "none", "all", marks=pytest.mark.long),
        pytest.param(torch.float16, "geglu", "all", marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_on_the_cpu(name, dtype, activation, around):
    check_threads(op, CPU, of_size(*SIZES[name], activation, around, dtype))


@pytest.mark.parametrize("runner", [CPU, INTERPRETER, HOST], ids=lambda runner: runner.name)
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_infinities_into_gelu(activation, runner):
    """As in float64; torch's own float32 kernel makes NaN of inf."""
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0]).repeat(8)[:, None]
    expected = linear(x.double(), torch.ones(1, 1).double(), activation=activation, backend="reference")
    assert expected[0] == torch.inf
    for dtype, setting in settings_of(runner):
        sample = Sample(
            "infinities", {"x": x.to(dtype), "weight": torch.ones(1, 1, dtype=dtype), "activation": activation}
        )
        torch.testing.assert_close(runner.run(op, sample, setting), expected.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("runner", [CPU, INTERPRETER, HOST], ids=lambda runner: runner.name)
@pytest.mark.parametrize("channels", [5, 40, 600])
def test_rows_that_do_not_deviate(channels, runner):
    """The norm of the zeros beyond their channels is infinite in 16 bits, and no weight of 0 would undo that."""
    x, weight = torch.full((3, channels), 1000.0).half(), torch.ones(7, channels).half()
    sample = Sample("constant", {"x": x, "weight": weight, "norm_eps": 1e-8})
    assert (runner.run(op, sample, settings_of(runner)[-1][1]) == 0).all()


@pytest.mark.parametrize(
    ("x", "activation", "out", "says"),
    [
        ((4, 8), "geglu", (4, 6), "twice as many"),
        ((4, 8), "none", (3, 6), "a row for"),
        ((4, 8), "relu", (4, 6), "'relu'"),
    ],
    ids=str,
)
def test_tensors_that_are_not_the_ops_are_refused_on_the_cpu(x, activation, out, says):
    with pytest.raises(ValueError, match=says):
        torch.ops.fastsd_cpu.linear.default(
            torch.zeros(x), torch.zeros(6, 8), None, None, None, None, activation, None, 0, torch.empty(out)
        )


@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize("name", CUTS)
def test_cuts(name):
    *_, blocks, defines = CUTS[name]
    *_, project = HOST.launches(op, cut(name))
    assert project["grid"] == (blocks, 1, 1)
    assert defines <= set(project["defines"])
    check(op, HOST, cut(name), {"seed": 0})


def test_a_card_that_they_do_not_fill_gets_small_tiles(monkeypatch):
    samples = covering.samples(op, "cpu", torch.float16)
    on_a_large_card = HOST.served(op, samples)
    monkeypatch.setattr(host, "MULTIPROCESSORS", 1)
    cut_otherwise = on_a_large_card.items() - HOST.served(op, samples).items()
    assert cut_otherwise
    assert all("TILE_ROWS=32" in defines for _, variants in cut_otherwise for _, defines in variants)


@pytest.mark.long
@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cuts_and_samples_in_any_order(dtype):
    samples = covering.samples(op, "cpu", dtype)
    for sample in (*(cut(name, dtype) for name in CUTS), *(samples[name] for name in HOST.served(op, samples))):
        check_all(op, HOST, sample)


@pytest.mark.usefixtures("one_multiprocessor")
def test_product_of_whole_numbers_is_exact():
    """Every element of a weight that is a permutation, and every row, is where it belongs."""
    x = (torch.arange(250)[:, None] * 3 + torch.arange(72)[None]).half()
    weight = torch.zeros(248, 72).half()
    weight[torch.arange(0, 216, 3), torch.randperm(72, generator=torch.Generator().manual_seed(0))] = 1.0
    sample = Sample("permutation", {"x": x, "weight": weight})
    assert "TILE_FEATURES=128" in HOST.launches(op, sample)[0]["defines"]
    assert torch.equal(HOST.run(op, sample, {"seed": 0}), x @ weight.t())


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
    tokens, channels, features, activation, around = size
    weights = features * 2 if activation == "geglu" else features
    if backend == "triton" or dtype != torch.float32:
        sample = of_size(2 * tokens, channels, weights, activation, around, dtype).map_tensors(Tensor.cuda)
        check(op, RUNNERS[f"card-{backend}"], sample, {})


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("everything_contiguous", ["linear_moments", "linear_project"]),
        ("bare_norm", ["linear_moments", "linear_project"]),
        ("plain_contiguous", ["linear_project"]),
    ],
)
def test_moments_are_taken_where_there_is_a_norm(name, kernels):
    assert [launch["kernel"] for launch in HOST.launches(op, sample_of(name))] == kernels
    assert len(INTERPRETER.launches(op, sample_of(name))) == len(kernels)


def test_rows_are_read_where_they_are():
    sample = sample_of("everything_packed")
    moments, project = HOST.launches(op, sample)
    x, weight, *_, residual, _ = project["args"][:8]
    for given, name in ((moments["args"][0], "x"), (x, "x"), (weight, "weight"), (residual, "residual")):
        assert given.data_ptr() == sample.kwargs[name].data_ptr()
    assert project["args"][11] == sample.kwargs["x"].stride(1) == 72

    *_, a = map(arguments, INTERPRETER.launches(op, sample))
    assert a["x_ptr"].data_ptr() == sample.kwargs["x"].data_ptr()
    assert (a["x_row"], a["residual_row"]) == (3 * 24, 3 * 20)


@pytest.mark.parametrize(
    ("strides", "read"),
    [((40, 1), (40, 1)), ((45, 1), (45, 1)), ((1, 24), (1, 24)), ((0, 1), (0, 1)), ((80, 2), (40, 1))],
    ids=str,
)
def test_a_weight_of_consecutive_elements_is_read_where_it_is(strides, read):
    weight = torch.empty_strided((24, 40), strides)
    (launch,) = INTERPRETER.launches(op, Sample("strided", {"x": torch.empty(5, 40), "weight": weight}))
    a = arguments(launch)
    assert (a["weight_row"], a["weight_column"]) == read


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
def test_accesses_are_as_wide_as_strides_and_addresses_allow(name, vector, out_vector):
    *_, project = HOST.launches(op, sample_of(name))
    assert {f"VECTOR={vector}", f"OUT_VECTOR={out_vector}"} <= set(project["defines"])


def test_parameters_have_one_dtype_and_whole_vectors():
    sample = cut("misaligned_norm")
    assert sample.kwargs["norm_weight"].data_ptr() % 16 != 0
    *_, project = HOST.launches(op, sample)
    assert all(p.data_ptr() % 16 == 0 and p.dtype == torch.float16 for p in project["args"][3:5])
    mixed = Sample("mixed", sample.kwargs | {"bias": sample.kwargs["bias"].double()})
    *_, project = HOST.launches(op, mixed)
    assert all(p.dtype == torch.float32 for p in project["args"][3:6])
    assert "PARAMETER_DTYPE=float" in project["defines"]


def plan(**changes):
    """The plan of the first projection of Stable Diffusion 1.5's largest map at 512²."""
    usual = {"rows": 8192, "width": 320, "features": 320, "gated": False, "alignment": 16, "out_alignment": 16}
    usual |= {"dtype": torch.float16, "parameter_dtype": torch.float16, "multiprocessors": host.MULTIPROCESSORS}
    return cuda_impl.plan(**usual | changes)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("positions", "channels"), [(4096, 320), (1024, 640), (256, 1280)])
def test_plan_fills_the_card_with_16_byte_accesses(positions, channels, batch):
    """For Stable Diffusion 1.5 at 512²."""
    for width, features, gated in ((1, 1, False), (1, 4, True), (4, 1, False)):
        size = {"width": width * channels, "features": features * channels, "gated": gated}
        p = plan(rows=batch * positions, **size, dtype=torch.bfloat16)
        assert {"VECTOR=8", "OUT_VECTOR=8", "STEP=32"} <= set(p.defines)
        assert p.project.grid[0] >= host.MULTIPROCESSORS
        # no block of zeros beyond the result, and none that is partly zeros
        weights = features * channels * (1 + gated)
        tile = cuda_impl.tile_for(batch * positions, weights, host.MULTIPROCESSORS)
        assert tile.rows * tile.weights * p.project.grid[0] == batch * positions * weights
        # and in Triton
        tile = triton_impl.tile(batch * positions, features * channels, gated, 2)
        assert batch * positions // tile.block_m * (features * channels // tile.block_n) >= 80
        assert features * channels % tile.block_n == 0


@pytest.mark.parametrize(
    ("changes", "defines"),
    [
        ({}, {"VECTOR=8", "OUT_VECTOR=8"}),
        ({"alignment": 8}, {"VECTOR=4", "OUT_VECTOR=8"}),
        ({"alignment": 2}, {"VECTOR=1", "OUT_VECTOR=8"}),
        ({"out_alignment": 4}, {"VECTOR=8", "OUT_VECTOR=2"}),
        ({"width": 324}, {"VECTOR=4", "OUT_VECTOR=8"}),
        ({"width": 6}, {"VECTOR=2", "STEP=16"}),
        ({"features": 75}, {"VECTOR=8", "OUT_VECTOR=1"}),
        ({"features": 20, "gated": True}, {"VECTOR=8", "OUT_VECTOR=4"}),
    ],
    ids=str,
)
def test_plan_narrows_accesses_where_rows_are_not_aligned(changes, defines):
    assert defines <= set(plan(**changes).defines)


@pytest.mark.parametrize("gated", [False, True])
def test_plan_stays_within_the_limits_of_a_launch(gated):
    for changes in (
        {"rows": 2**31},
        {"rows": 2**31, "features": 1},
        {"rows": 1, "features": 2**29},
        {"rows": 1, "features": 1, "width": 2**30},
        {"rows": 1, "features": 1, "width": 1},
        {"multiprocessors": 1},
        {"multiprocessors": 10**5},
    ):
        p = plan(**changes, gated=gated)
        for launch in (p.moments, p.project):
            assert 0 < launch.grid[0] < 2**31
            assert launch.grid[1:] == (1, 1)
            assert launch.block[0] in (32, 64, 128, 256)
            assert launch.shared_bytes <= 99 * 1024


def test_no_plan_asks_for_more_blocks_than_a_refusal_counts():
    sizes = (1, 2, 16, 17, 31, 33, 64, 100, 154, 1280, 8192)
    for rows, weights, multiprocessors in itertools.product(sizes, sizes, (1, host.MULTIPROCESSORS)):
        tile = cuda_impl.tile_for(rows, weights, multiprocessors)
        assert tile.count(rows, weights) <= cuda_impl._TILES[-1].count(rows, weights)


@pytest.mark.parametrize(
    ("module", "rows", "channels", "weights", "norm_eps", "says"),
    [
        (cuda_impl, 1, 2**30, 6, 1e-5, ()),
        (cuda_impl, 1, 2**30 + 1, 6, 1e-5, ("weight is 6 by 1073741825; the cuda backend takes up to 1073741824",)),
        (cuda_impl, 1, 8, 2**30, 1e-5, ()),
        (cuda_impl, 1, 8, 2**30 + 1, 1e-5, ("weight is 1073741825 by 8; the cuda backend takes up to",)),
        (cuda_impl, 2**31, 8, 256, 1e-5, ()),
        (cuda_impl, 2**31, 8, 512, 1e-5, ("x has 2147483648 rows for 512 of the weight", "take 2147483648 blocks")),
        (cuda_impl, 2**34, 8, 1, 1e-5, ("take 2147483648 blocks",)),
        (cuda_impl, 0, 8, 6, 1e-5, ()),
        (triton_impl, 1, 2**30, 1, 1e-5, ()),
        (triton_impl, 1, 2**30 + 1, 1, 1e-5, ("weight", "channels", str(2**30), str(2**30 + 1))),
        (triton_impl, 1, 1, 2**30, None, ()),
        (triton_impl, 1, 1, 2**30 + 1, None, ("weight", "rows", str(2**30), str(2**30 + 1))),
        (triton_impl, 4 * (2**31 - 1), 1, 1, 1e-5, ()),
        (triton_impl, 4 * (2**31 - 1) + 1, 1, 1, 1e-5, ("x", str(2**31 - 1), str(2**31))),
        (triton_impl, 128 * (2**31 - 1), 1, 1, None, ()),
        (triton_impl, 128 * (2**31 - 1) + 1, 1, 1, None, ("x", str(2**31 - 1), str(2**31))),
        (triton_impl, 0, 1, 1, 1e-5, ()),
    ],
)
def test_more_than_a_launch_has_is_refused(module, rows, channels, weights, norm_eps, says):
    with FakeTensorMode():
        x = torch.empty(rows, channels, device="cuda", dtype=torch.float16)
        given = (x.new_empty(weights, channels), None, None, None, norm_eps, "none", None)
        sentence = module.reject(x, *given)
        assert (sentence is not None) == bool(says)
        assert all(words in sentence for words in says)
        if module is triton_impl:
            assert not says or "backend='reference'" in sentence
            steps = triton_impl.launches(x, *given)[1]
            assert says or max((launch.grid[0] for launch in steps), default=0) < 2**31


def test_tiles_are_such_as_tensor_cores_multiply():
    for size in itertools.product((1, 17, 64, 154, 512, 8192, 1 << 20), (1, 33, 320, 640, 1280, 5120), (0, 1), (2, 4)):
        *_, gated, _ = size
        tile = triton_impl.tile(*size)
        assert all(number & (number - 1) == 0 for number in tile)
        assert min(tile.block_m, tile.block_n, tile.block_k) >= 16
        assert 1 <= tile.num_warps <= 8
        # 32 KiB of sums at most, so that the registers hold them
        assert tile.block_m * tile.block_n * (2 if gated else 1) <= 128 * 128


def test_small_tiles_take_the_paths_of_large_inputs():
    samples = covering.samples(op, "cpu", torch.float32)
    with interpreter.small_tiles("linear"):
        launched = [launch for name in samples for launch in INTERPRETER.launches(op, samples[name])]
    moments, project = (
        [arguments(launch) for launch in launched if launch.kernel.__name__ == name]
        for name in ("row_moments", "project")
    )
    assert all((a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_K"]) == (16, 16, 16) for a in project)
    # more rows of tiles than run side by side, and the last ones are not full
    assert any(
        a["row_tiles"] > 2 * 8
        and a["column_tiles"] > 1
        and all(a[size] % 16 for size in ("rows", "features", "channels"))
        and a["channels"] > 16
        for a in project
    )
    assert any(a["column_tiles"] > 16 for a in project)
    assert any(a["channels"] > 16 * 16 for a in project)
    assert any(a["channels"] > a["BLOCK_K"] and a["rows"] % a["BLOCK_M"] for a in moments)
    assert any(a["channels"] > 16 * a["BLOCK_K"] for a in moments)


def test_the_interpreter_refuses_bfloat16():
    with pytest.raises(BackendUnavailable, match=r"bfloat16.*TRITON_INTERPRET"):
        INTERPRETER.launches(op, sample_of("plain_contiguous", torch.bfloat16))
