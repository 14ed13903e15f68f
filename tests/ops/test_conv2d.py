"""What is particular to conv2d: algorithms of the CPU and their choice, plans, large tiles, exact results."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels import conv2d, cpu_runtime, cuda_runtime
from fastsd_kernels.conv2d import cuda_impl, op, triton_impl
from fastsd_kernels.conv2d.cases import WINOGRAD_RELATIVE_L2
from fastsd_kernels.testing import Sample, feature_map
from fastsd_kernels.testing.inputs import random_tensor
from tests.contract import covering
from tests.contract.check import check, check_all
from tests.runners import RUNNERS
from tests.runners import host as on_host
from tests.runners.interpreter import small_tiles
from tests.runners.protocol import attributes

LIKE: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
WINOGRAD = ("winograd2", "winograd4")
OWN = ("product", *WINOGRAD)  # algorithms of csrc/cpu/conv2d.cpp
CARDS = [pytest.param(RUNNERS[name], marks=pytest.mark.gpu, id=name) for name in ("card-cuda", "card-triton")]


def map_of(*shape: int, layout: str = "channels_last", **like: Any) -> Tensor:
    return feature_map(shape, layout, **LIKE | like)


def weight_of(out_channels: int, channels: int, kernel: int = 3, **like: Any) -> Tensor:
    scale = (channels * kernel * kernel) ** -0.5
    return map_of(out_channels, channels, kernel, kernel, layout="contiguous", seed=1, **like) * scale


def relative_l2(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def exactly(x: Tensor, weight: Tensor, **given: Any) -> Tensor:
    return conv2d(x.double(), weight.double(), **given, backend="reference")


def test_second_gradients():
    like = {"dtype": torch.float64, "requires_grad": True}
    x, skip, weight = torch.randn(1, 4, 3, 2, **like), torch.randn(1, 2, 3, 2, **like), torch.randn(3, 6, 3, 3, **like)
    norm, residual = torch.randn(6, **like), torch.randn(1, 3, 3, 2, **like)
    given = {"padding": 1, "num_groups": 3, "eps": 1e-3, "activation": "silu"}
    torch.autograd.gradgradcheck(
        lambda x, s, w, n, r: conv2d(x, w, skip=s, norm_weight=n, residual=r, **given),
        (x, skip, weight, norm, residual),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_the_dtype_in_force(dtype):
    x, weight = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3)
    with torch.autocast("cpu", dtype):
        assert conv2d(x, weight, padding=1).dtype == dtype
    assert conv2d(x, weight, padding=1).dtype == torch.float32


# The CPU's algorithms


@pytest.mark.parametrize("algorithm", OWN)
@pytest.mark.parametrize(
    ("channels", "size", "layout"),
    [((96, 64), (40, 33), "channels_last"), ((1000, 600), (19, 14), "contiguous")],
    ids=["large map", "many channels"],
)
def test_threads_do_not_change_a_bit(channels, size, layout, algorithm):
    x, skip = (map_of(3, count, *size, layout=layout, seed=1) for count in channels)
    given = {"x": x, "weight": weight_of(72, sum(channels)), "skip": skip, "padding": 1, "algorithm": algorithm}
    sample = Sample("threads", given | {"num_groups": 32, "activation": "silu"})
    one, two, five = (
        RUNNERS["cpu"].run(op, sample, {"isa": cpu_runtime.ISAS[cpu_runtime.isa()], "threads": n}) for n in (1, 2, 5)
    )
    assert torch.equal(one, two)
    assert torch.equal(one, five)


# The last one: more tiles than a block holds, in rows of more than a strip has, and a map that no tile divides
@pytest.mark.parametrize("shape", [(320, 64, 64), (2560, 16, 16), (1280, 8, 8), (48, 301, 421)], ids=str)
def test_error_of_winograd_at_real_sizes(shape):
    x, weight = map_of(1, *shape), weight_of(8, shape[0])
    given = {"padding": 1} | ({"num_groups": 32, "activation": "silu"} if shape[0] % 32 == 0 else {})
    exact = exactly(x, weight, **given)
    for algorithm in WINOGRAD:
        actual = conv2d(x, weight, **given, algorithm=algorithm, backend="cpu")
        assert relative_l2(actual, exact) <= WINOGRAD_RELATIVE_L2


WEIGHT_LAYOUTS = {
    "contiguous": lambda weight: weight,
    "channels_last": lambda weight: weight.contiguous(memory_format=torch.channels_last),
    "every_other_channel": lambda weight: torch.stack([weight, weight], 2).flatten(1, 2)[:, ::2],
    "transposed": lambda weight: weight.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize(("channels", "out_channels"), [(19, 1), (229, 33), (515, 7), (1601, 40)])
def test_winograd_with_weights_of_every_layout_and_size(channels, out_channels):
    """Channels that fill no vector and no panel, and more of them than are transformed at once, for several blocks."""
    x, weight = map_of(2, channels, 33, 30), weight_of(out_channels, channels)
    exact = exactly(x, weight, padding=1)
    for layout, algorithm, isa in itertools.product(WEIGHT_LAYOUTS, WINOGRAD, RUNNERS["cpu"].settings["isa"]):
        laid_out = WEIGHT_LAYOUTS[layout](weight)
        assert torch.equal(laid_out, weight)
        sample = Sample("weights", {"x": x, "weight": laid_out, "padding": 1, "algorithm": algorithm})
        actual = RUNNERS["cpu"].run(op, sample, {"isa": isa, "threads": 1})
        assert relative_l2(actual, exact) <= WINOGRAD_RELATIVE_L2, (layout, algorithm, isa)


@pytest.mark.parametrize("algorithm", OWN)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [20, 1601])
def test_weights_that_are_edited_between_calls(channels, layout, algorithm):
    """However small the edit, and whether or not torch knows of it."""
    x, weight = map_of(1, channels, 9, 10), WEIGHT_LAYOUTS[layout](weight_of(33, channels))

    def convolve() -> Tensor:
        return conv2d(x, weight, padding=1, algorithm=algorithm, backend="cpu").double()

    first = convolve()
    version, address = weight._version, weight.data_ptr()
    weight.data[32, channels - 1, 1, 1] += 50
    second = convolve()
    assert (weight._version, weight.data_ptr()) == (version, address)
    # the tap in the middle adds a multiple of one channel to another
    expected = first.clone()
    expected[:, 32] += 50 * x[:, -1].double()
    assert relative_l2(second, expected) <= WINOGRAD_RELATIVE_L2
    assert relative_l2(second, first) > 0.1
    weight.data[32, channels - 1, 1, 1] -= 50
    assert relative_l2(convolve(), first) <= WINOGRAD_RELATIVE_L2


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells how much memory a process has")
@pytest.mark.parametrize("algorithm", OWN)
def test_nothing_is_kept_of_weights(algorithm):
    x, weights = map_of(1, 320, 8, 8), [weight_of(320, 320) for _ in range(16)]
    conv2d(x, weights[0].clone(), padding=1, algorithm=algorithm, backend="cpu")
    before = resident_bytes()
    for weight in (*weights, *weights):
        conv2d(x, weight, padding=1, algorithm=algorithm, backend="cpu")
    assert resident_bytes() - before < sum(weight.nbytes for weight in weights) / 4


@pytest.mark.parametrize("algorithm", WINOGRAD)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_tiles(value, algorithm):
    """Winograd's tiles share their sums: NaN and infinities make NaN of whole tiles, and of nothing else."""
    x, weight = map_of(1, 16, 24, 24).clone(), weight_of(8, 16)
    x[0, 3, 9, 9] = value
    y = conv2d(x, weight, padding=1, algorithm=algorithm, backend="cpu")
    plain = conv2d(x, weight, padding=1, backend="reference")
    assert not torch.isfinite(y[~torch.isfinite(plain)]).any()
    tile = int(algorithm[-1])
    spread = torch.isfinite(y[0]).all(0).logical_not().nonzero()
    assert spread.min() >= (8 // tile) * tile
    assert spread.max() < (10 // tile + 1) * tile


# Results that are exact

EXACT = [
    pytest.param(RUNNERS["cpu"], torch.float32, {"algorithm": "product"}, id="cpu"),
    pytest.param(RUNNERS["interpreter"], torch.float32, {}, id="interpreter"),
    pytest.param(RUNNERS["host"], torch.float16, {}, id="host"),
    *(pytest.param(*card.values, torch.float16, {}, marks=pytest.mark.gpu, id=card.id) for card in CARDS),
]


def run(runner, **kwargs: Any) -> Tensor:
    first = {name: values[0] for name, values in runner.settings.items()}
    sample = Sample("exact", kwargs).map_tensors(lambda tensor: tensor.to(runner.device))
    return runner.run(op, sample, first).cpu()


@pytest.mark.parametrize(("runner", "dtype", "given"), EXACT)
def test_nearest_is_torchs(runner, dtype, given):
    sizes = [((5, 6), size) for size in ((1, 1), (3, 2), (9, 5), (10, 12), (19, 31))]
    # where float32 rounds the quotient of the sizes
    sizes += [((1, size), (1, enlarged)) for size, enlarged in ((2, 82), (3, 123), (6, 74), (9, 111))]
    for size, enlarged in sizes:
        x = torch.arange(8 * math.prod(size), dtype=dtype).view(1, 8, *size)
        expected = F.interpolate(x, enlarged, mode="nearest")
        if size[0] == 1:
            assert not torch.equal(expected[0, 0, 0], x[0, 0, 0, torch.arange(enlarged[1]) * size[1] // enlarged[1]])
        weight = torch.eye(8, dtype=dtype)[..., None, None]
        torch.testing.assert_close(
            run(runner, x=x, weight=weight, upsample_size=enlarged, **given), expected, rtol=0, atol=0
        )


@pytest.mark.parametrize(("runner", "dtype", "given"), EXACT)
def test_norm_of_a_constant_is_zero(runner, dtype, given):
    """Nor does the error of rounding its mean become a deviation, which 1/√eps would magnify."""
    x = torch.full((1, 8, 37, 41), 30000.7).to(dtype)
    y = run(runner, x=x, weight=torch.ones(1, 8, 3, 3, dtype=dtype), padding=1, num_groups=2, **given)
    assert (y == 0).all(), y.abs().max()


# CUDA's kernels


def cut(
    shape: tuple[int, int, int, int], out_channels: int, kernel=3, skip_channels=0, stride=1, dtype=torch.float16
) -> dict[str, Any]:
    """Arguments with a norm of the concatenation and a whole epilogue, channels last."""
    batch, x_channels, height, width = shape
    channels, out_size = x_channels + skip_channels, (math.ceil(height / stride), math.ceil(width / stride))
    return {
        "x": map_of(*shape, dtype=dtype),
        "skip": map_of(batch, skip_channels, height, width, dtype=dtype) if skip_channels else None,
        "weight": weight_of(out_channels, channels, kernel, dtype=dtype),
        "stride": stride,
        "padding": kernel // 2,
        "num_groups": 8,
        "norm_weight": map_of(channels, 1, layout="contiguous", dtype=dtype)[:, 0],
        "norm_bias": map_of(channels, 2, layout="contiguous", dtype=dtype)[:, 0],
        "activation": "silu",
        "bias": map_of(out_channels, 3, layout="contiguous", dtype=dtype)[:, 0],
        "channel_bias": map_of(batch, out_channels, layout="contiguous", dtype=dtype),
        "residual": map_of(batch, out_channels, *out_size, dtype=dtype),
        "output_scale": 0.75,
    }


# What the samples are too small for: arguments, the tile that they must get, the splits; on so many multiprocessors
CUTS = {
    "largest_tile": (cut((1, 40, 8, 16), 128), (8, 16, 128), 2, 132),
    "largest_pointwise_tile": (cut((1, 40, 8, 16), 128, 1), (1, 128, 128), 1, 132),
    "wide_tile": (cut((1, 16, 16, 16), 64), (8, 16, 64), 1, 132),
    "small_map": (cut((1, 16, 8, 8), 128), (8, 8, 128), 1, 132),
    "large_halo": (cut((1, 16, 16, 16), 72, stride=2), (8, 8, 16), 1, 132),
    "splits": (cut((2, 72, 6, 5), 24, skip_channels=40), (8, 8, 32), 5, 132),
    "one_split": (cut((2, 72, 6, 5), 24, skip_channels=40), (8, 8, 32), 1, 1),
    "splits_off_vector_width": (cut((1, 75, 6, 5), 6, skip_channels=45), (8, 8, 16), 5, 132),
    "splits_bfloat16": (cut((1, 72, 6, 5), 24, skip_channels=40, dtype=torch.bfloat16), (8, 8, 32), 5, 132),
    "splits_pointwise": (cut((1, 520, 5, 5), 16, 1), (1, 32, 16), 2, 132),
}


def on_multiprocessors(count: int):
    return attributes((on_host, "MULTIPROCESSORS", count), (cuda_runtime, "multiprocessors", lambda device: count))


@pytest.mark.parametrize("name", CUTS)
def test_large_tiles_and_splits(name):
    given, (height, width, channels), splits, multiprocessors = CUTS[name]
    sample = Sample(name, given)
    with on_multiprocessors(multiprocessors):
        launches = RUNNERS["host"].launches(op, sample)
        kernels = ["group_norm_silu_stats", "conv2d_coefficients", "conv2d_implicit_gemm", "conv2d_reduce"]
        assert [launch["kernel"] for launch in launches] == kernels[: 4 if splits > 1 else 3]
        assert {f"TILE_H={height}", f"TILE_W={width}", f"TILE_K={channels}"} <= set(launches[2]["defines"])
        workspace = launches[2]["args"][8]
        assert (1 if workspace is None else workspace.shape[0]) == splits
        check(op, RUNNERS["host"], sample, {"seed": 1})


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUTS)
def test_large_tiles_and_splits_on_a_card(name):
    with on_multiprocessors(CUTS[name][3]):
        check_all(op, RUNNERS["card-cuda"], Sample(name, CUTS[name][0]).map_tensors(Tensor.cuda))


def test_statistics_in_several_parts():
    """Partial means that differ by little beside their size, more of them than a warp has lanes."""
    x = cut((1, 8, 48, 48), 8, 1)["x"].float() / 8 + torch.arange(48)[:, None] / 6 + 100
    sample = Sample("parts", cut((1, 8, 48, 48), 8, 1) | {"num_groups": 1, "x": x.half()})
    assert RUNNERS["host"].launches(op, sample)[0]["args"][-1] > 8
    check(op, RUNNERS["host"], sample, {"seed": 1})


def test_weights_are_packed():
    """Those in channels last are not copied; else rows are padded, apart for x and for skip."""
    weight = torch.randn(8, 24, 3, 3).half().contiguous(memory_format=torch.channels_last)
    packed = cuda_impl._packed(weight, 16)
    assert (packed.shape, packed.data_ptr()) == ((8, 9, 24), weight.data_ptr())
    assert torch.equal(packed.view(8, 3, 3, 24), weight.permute(0, 2, 3, 1))
    weight = torch.randn(8, 15, 3, 3).half()
    rows, packed = weight.flatten(2).movedim(1, 2), cuda_impl._packed(weight, 11)
    assert torch.equal(packed, torch.cat([F.pad(rows[..., :11], (0, 5)), F.pad(rows[..., 11:], (0, 4))], -1))


def cuda_plan(**changes: Any) -> cuda_impl.Plan:
    """The plan of a convolution of 320 channels on 64 × 64 positions."""
    sizes = {"batch": 2, "x_channels": 320, "skip_channels": 0, "num_groups": 32, "kernel": 3, "stride": 1}
    sizes |= {"out_channels": 320, "out_height": 64, "out_width": 64, "alignment": 16, "out_alignment": 16}
    dtypes = {"dtype": torch.float16, "parameter_dtype": torch.float16}
    return cuda_impl.plan(**sizes | dtypes | {"multiprocessors": 132} | changes)


# Stable Diffusion 1.5 at 512²: input channels, those of skip, output channels, side
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("x_channels", "skip_channels", "out_channels", "side"),
    [(320, 0, 320, 64), (640, 320, 640, 32), (1280, 640, 1280, 16), (1280, 1280, 1280, 8), (1280, 0, 1280, 8)],
)
def test_cuda_plan_fills_the_card_with_16_byte_accesses(x_channels, skip_channels, out_channels, side, batch):
    channels = {"x_channels": x_channels, "skip_channels": skip_channels, "out_channels": out_channels}
    p = cuda_plan(batch=batch, **channels, out_height=side, out_width=side)
    assert {"VECTOR=8", "OUT_VECTOR=8", "STEP=32"} <= set(p.defines)
    assert p.convolve.grid[0] >= 132
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
def test_cuda_plan_narrows_accesses_where_rows_are_not_aligned(changes, defines):
    assert set(defines) <= set(cuda_plan(**changes).defines)


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
def test_cuda_plan_stays_within_the_limits_of_a_launch(changes):
    for kernel, stride in itertools.product((1, 3), (1, 2)):
        p = cuda_plan(**changes, kernel=kernel, stride=stride)
        for launch in (p.coefficients, p.convolve, p.reduce):
            assert 0 < launch.grid[0] < 2**31
            assert launch.grid[1:] == (1, 1)
            assert launch.block[0] in (32, 64, 128, 256)
            assert launch.shared_bytes <= 99 * 1024  # of the smallest cards from compute capability 8.0 on
        assert 1 <= p.splits <= 16


def test_every_cuda_tile_is_of_whole_warps():
    sizes = (1, 2, 7, 8, 9, 16, 33, 64)
    for height, width, channels, stride in itertools.product(sizes, sizes, (1, 17, 40, 64, 640), (1, 2)):
        tile = cuda_impl.tile_for(stride, channels, height, width)
        assert tile.channels % tile.warp_channels == 0
        assert tile.height * tile.width % 32 == 0
        assert 32 <= tile.threads <= 256


# Triton's kernels


def launched(sample: Sample, kernel: str = "convolve") -> list[dict[str, Any]]:
    """Arguments of the launches of a kernel."""
    steps = RUNNERS["interpreter"].launches(op, sample)
    return [dict(zip(s.kernel.arg_names, s.args, strict=True)) for s in steps if s.kernel.__name__ == kernel]


def test_small_tiles_take_the_paths_of_large_maps():
    taken = set()
    samples = covering.samples(op, "cpu", torch.float32)
    with small_tiles("conv2d"):
        for name in RUNNERS["interpreter"].served(op, samples):
            for a in launched(samples[name]):
                several = a["row_tiles"] > 1, a["column_tiles"] > 1, a["splits"] > 2
                x_steps = -(-a["x_channels"] // a["BLOCK_K"]) * a["KERNEL"] ** 2
                seam_in_a_split = a["skip_channels"] > 0 and x_steps % a["steps_per_split"] > 0
                ragged = a["positions"] % a["BLOCK_M"] > 0, a["out_channels"] % a["BLOCK_N"] > 0
                taken |= {("several", *several), ("ragged", *ragged), ("seam", seam_in_a_split, a["splits"] > 2)}
                taken.add(("side by side", a["batch"] * a["row_tiles"] > 2 * 8))
            for a in launched(samples[name], "sum_splits"):
                taken.add(("sum", a["row_tiles"] > 1, a["column_tiles"] > 1))
            for a in launched(samples[name], "norm_coefficients"):
                taken.add(("statistics in several parts", a["splits"] > 1, a["channel_tiles"] > 1))
    assert taken >= {("several", True, True, False), ("several", True, False, True), ("ragged", True, True)}
    assert taken >= {("seam", True, True), ("seam", False, True), ("side by side", True), ("sum", True, True)}
    assert ("statistics in several parts", True, True) in taken


SHAPES = (  # batch, channels of x and skip, output channels, positions, side of the kernel
    (1, 320, 0, 320, 64 * 64, 3),
    (2, 640, 320, 640, 32 * 32, 3),
    (1, 1280, 0, 1280, 16 * 16, 3),
    (1, 1280, 1280, 1280, 8 * 8, 3),
    (2, 1280, 640, 1280, 16 * 16, 1),
    (1, 4, 0, 320, 64 * 64, 3),
    (1, 128, 0, 3, 512 * 512, 3),
    (3, 30, 7, 19, 63, 3),
    (65_537, 4, 0, 4, 4, 3),
)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_plan_covers_the_product(shape, itemsize):
    batch, x_channels, skip_channels, out_channels, positions, kernel = shape
    plan = triton_impl.plan(*shape, itemsize)
    tile = plan.tile
    assert positions <= plan.row_tiles * tile.block_m < positions + tile.block_m
    assert out_channels <= plan.column_tiles * tile.block_n < out_channels + tile.block_n
    steps = sum(-(-channels // tile.block_k) for channels in (x_channels, skip_channels)) * kernel**2
    assert steps <= plan.splits * plan.steps_per_split < steps + plan.steps_per_split
    if itemsize == 2 and min(x_channels, out_channels) >= 320:
        # most multiprocessors have one
        assert batch * plan.row_tiles * plan.column_tiles * plan.splits >= 80


@pytest.mark.parametrize("runner", CARDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_unets_and_decoders_on_a_card(runner, layout, dtype):
    like = {"device": "cuda", "dtype": dtype}
    for batch, x_channels, skip_channels, out_channels, side, upsample_size in (
        (1, 320, 0, 320, 64, None),
        (2, 640, 320, 640, 32, None),
        (1, 1280, 1280, 1280, 8, None),
        (1, 1280, 0, 1280, 16, (32, 32)),
        (1, 4, 0, 320, 64, None),
        (1, 128, 0, 3, 128, None),
    ):
        channels, given = x_channels + skip_channels, {"padding": 1, "upsample_size": upsample_size}
        given |= {"x": map_of(batch, x_channels, side, side, layout=layout, **like)}
        given |= {"weight": weight_of(out_channels, channels, **like), "bias": random_tensor((out_channels,), **like)}
        if skip_channels:
            given["skip"] = map_of(batch, skip_channels, side, side, layout=layout, seed=4, **like)
        if channels % 32 == 0:
            given |= {"num_groups": 32, "activation": "silu"}
            given |= {
                "norm_weight": random_tensor((channels,), **like),
                "norm_bias": random_tensor((channels,), **like),
            }
        check_all(op, runner, Sample(f"{batch}x{channels}to{out_channels}_{side}", given))
