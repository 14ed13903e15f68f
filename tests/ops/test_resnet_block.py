"""What is particular to resnet_block: diffusers' block as its definition, and the moments between its convolutions."""

import inspect
import itertools
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch._subclasses import FakeTensorMode

from fastsd_kernels import cuda_runtime, resnet_block
from fastsd_kernels.conv2d import cuda_impl as conv2d
from fastsd_kernels.conv2d import measured
from fastsd_kernels.resnet_block import cases, cuda_impl, op
from fastsd_kernels.testing import Sample, check_result, feature_map
from fastsd_kernels.testing.inputs import random_tensor
from tests.contract import covering
from tests.contract.check import check, check_all
from tests.harness import host
from tests.runners import RUNNERS
from tests.runners import host as on_host
from tests.runners.interpreter import small_tiles
from tests.runners.protocol import attributes, call

FLOAT32, FLOAT16 = (covering.samples(op, "cpu", dtype) for dtype in (torch.float32, torch.float16))
CARDS = [pytest.param(RUNNERS[name], marks=pytest.mark.gpu, id=name) for name in ("card-cuda", "card-triton")]


def arguments(**kwargs: Any) -> dict[str, Any]:
    """Those of the op, in the order of its schema, without backend."""
    bound = inspect.signature(resnet_block).bind(**kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "backend"}


def on_multiprocessors(count: int):
    return attributes((on_host, "MULTIPROCESSORS", count), (cuda_runtime, "multiprocessors", lambda device: count))


def sample_of(shape, out_channels, num_groups=4, layout="channels_last", device="cpu", dtype=torch.float16, **changes):
    like = {"device": device, "dtype": dtype}
    x = feature_map(shape, layout, **like)
    channels = shape[1] + (changes["skip"].shape[1] if "skip" in changes else 0)
    return Sample(f"made_{shape}", {"x": x} | cases.block(channels, out_channels, num_groups, **like) | changes)


@pytest.mark.parametrize("out_channels", [16, 24])
def test_the_reference_is_the_block_of_diffusers(out_channels):
    block = ResnetBlock2D(
        in_channels=16, out_channels=out_channels, temb_channels=12, groups=4, groups_out=8, output_scale_factor=2.0
    )
    block, x, temb = block.double(), torch.randn(2, 16, 5, 6).double(), torch.randn(2, 12).double()
    shortcut = block.conv_shortcut
    ours = resnet_block(
        x,
        block.conv1.weight,
        block.conv2.weight,
        block.conv1.bias,
        block.conv2.bias,
        num_groups=4,
        norm1_weight=block.norm1.weight,
        norm1_bias=block.norm1.bias,
        num_groups_out=8,
        norm2_weight=block.norm2.weight,
        norm2_bias=block.norm2.bias,
        eps=block.norm1.eps,
        channel_bias=block.time_emb_proj(torch.nn.functional.silu(temb)),
        shortcut_weight=None if shortcut is None else shortcut.weight,
        shortcut_bias=None if shortcut is None else shortcut.bias,
        output_scale=0.5,
        backend="reference",
    )
    torch.testing.assert_close(ours, block(x, temb))


def test_second_gradients():
    like = {"dtype": torch.float64, "requires_grad": True}
    x, skip = torch.randn(1, 2, 3, 2, **like), torch.randn(1, 2, 3, 2, **like)
    conv1, conv2, shortcut = (torch.randn(shape, **like) for shape in ((2, 4, 3, 3), (2, 2, 3, 3), (2, 4, 1, 1)))
    torch.autograd.gradgradcheck(
        lambda x, s, a, b, c: resnet_block(x, a, b, skip=s, num_groups=2, eps=1e-3, shortcut_weight=c),
        (x, skip, conv1, conv2, shortcut),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", op.backends)
def test_the_result_of_a_block_without_parts_is_no_alias(backend, layout):
    given = {"x": feature_map((1, 4, 3, 3), layout, device="cpu", dtype=torch.float32)}
    y = op.backends[backend].module.run(*arguments(**given, conv1_weight=None, conv2_weight=None).values())
    assert y.data_ptr() != given["x"].data_ptr()


# The map between the convolutions


@pytest.mark.parametrize(
    ("runner", "setting", "channels"),
    [
        pytest.param(RUNNERS["cpu"], {"isa": "baseline", "threads": 1}, (8,), id="cpu"),
        pytest.param(RUNNERS["interpreter"], {"tiles": "as_launched"}, (8,), id="interpreter"),
        pytest.param(RUNNERS["interpreter"], {"tiles": "small"}, (8, 24), id="interpreter-small"),
        pytest.param(RUNNERS["host"], {"seed": 1}, (8, 40), id="host"),
        *(pytest.param(*card.values, {}, (8, 72), marks=pytest.mark.gpu, id=card.id) for card in CARDS),
    ],
)
def test_a_constant_map_has_no_variance(runner, setting, channels):
    """Its moments are those of the rounded map; nor does the error of rounding them become a deviation.

    The product is in one split, and with more channels in several.
    """
    for (dtype, value), count in itertools.product(((torch.float16, 299.9), (torch.float32, 30000.7)), channels):
        if dtype == torch.float32 and runner.backend == "cuda":
            continue
        x, weight = torch.randn(1, count, 4, 5).to(runner.device, dtype), (count, count, 3, 3)
        zeros, ones, bias = x.new_zeros(weight), x.new_ones(weight), torch.full((count,), value, device=x.device)
        assert dtype == torch.float32 or (bias.to(dtype) != bias).all()
        given = {"x": x, "conv1_weight": zeros, "conv2_weight": ones, "conv1_bias": bias, "num_groups": 2}
        torch.testing.assert_close(runner.run(op, Sample("constant", given), setting), x, rtol=0, atol=0)


def test_a_map_that_overflows():
    """Its group has no mean, so there is NaN where a finite mean would leave the infinity as it is."""
    bias = torch.zeros(2, 16)
    bias[0, 5] = 1e5
    sample = sample_of((2, 8, 7, 9), 16, channel_bias=bias, norm2_weight=None)
    sample.kwargs["conv2_weight"].abs_()
    assert RUNNERS["host"].run(op, sample, {"seed": 0})[0].isnan().all()
    check(op, RUNNERS["host"], sample, {"seed": 1})


# Maps that end inside a tile, and inside a warp's patch of it: shape of x, output channels, the tile that they must get
CUTS = {
    "largest_tile": ((1, 8, 7, 15), 120, (8, 16, 128)),
    "wide_tile": ((1, 16, 15, 29), 40, (8, 16, 16)),
    "small_tile": ((2, 8, 13, 7), 24, (8, 8, 32)),
    "smallest_tile": ((1, 8, 3, 5), 16, (4, 8, 16)),
    "long_row": ((1, 8, 1, 100), 24, (1, 128, 32)),
    "row": ((1, 8, 2, 40), 24, (1, 64, 32)),
}


@pytest.mark.parametrize("name", CUTS)
def test_maps_that_end_inside_a_tile(name):
    shape, out_channels, (height, width, channels) = CUTS[name]
    sample = sample_of(shape, out_channels)
    with on_multiprocessors(1):
        defines = [set(launch["defines"]) for launch in RUNNERS["host"].launches(op, sample)]
        assert any({f"TILE_H={height}", f"TILE_W={width}", f"TILE_K={channels}", "MOMENTS=1"} <= d for d in defines)
        check(op, RUNNERS["host"], sample, {"seed": 1})


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUTS)
def test_maps_that_end_inside_a_tile_on_a_card(name):
    with on_multiprocessors(1):
        check_all(op, RUNNERS["card-cuda"], sample_of(*CUTS[name][:2], device="cuda"))


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("far", [0.0, 2000.0])
def test_moments_are_those_of_the_map_as_it_is_stored(name, far):
    """Also where deviations are small beside the mean: none of it cancels."""
    shape, out_channels, _ = CUTS[name]
    a = arguments(**sample_of(shape, out_channels).kwargs)
    channel_bias = far + torch.linspace(-2, 2, out_channels).half()[None]
    norm = (a["num_groups"], a["norm1_weight"], a["norm1_bias"], a["eps"], None, None, "silu", None)
    rest = (a["conv1_bias"], 1, [1] * 4, a["skip"], *norm, channel_bias, None, 1.0)
    h, moments = conv2d.convolve(host.launch, 132, a["x"], a["conv1_weight"], *rest, note_moments=True)
    assert moments.patch in ((2, 16), (4, 8), (1, 32))
    (height, width), (rows, columns) = moments.patch, moments.values.shape[1:3]
    for row in range(rows):
        for column in range(columns):
            piece = h[:, :, row * height :, column * width :][:, :, :height, :width].double().flatten(2)
            mean, m2 = moments.values[:, row, column].double().unbind(-1)
            torch.testing.assert_close(mean, piece.mean(2), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(m2, piece.var(2, correction=0) * piece.shape[2], rtol=1e-5, atol=1e-5)


MOMENTS_ARGUMENT = {"conv2d_implicit_gemm": 9, "conv2d_coefficients": 1}


@pytest.mark.parametrize("kernel", MOMENTS_ARGUMENT)
def test_moments_are_of_no_greater_size_than_the_kernels_need(kernel):
    def one_less(source, name, defines, *, args, **launch):
        at = MOMENTS_ARGUMENT.get(name)
        if name == kernel and args[at] is not None:
            args[at] = args[at].flatten()[:-1].clone()
        host.launch(source, name, defines, args=args, **launch)

    with on_host.as_a_card(one_less), pytest.raises(RuntimeError, match="outside every tensor"):
        call(op, FLOAT16["everything_contiguous"], "cuda")


FIRST = ["group_norm_silu_stats", "conv2d_coefficients", "conv2d_implicit_gemm"]


@pytest.mark.parametrize(
    ("multiprocessors", "kernels"),
    [(1, [*FIRST, "conv2d_coefficients", "conv2d_implicit_gemm"]), (132, [*FIRST, "conv2d_reduce"] * 2)],
    ids=["one split", "several splits"],
)
def test_splits_alone_need_a_pass_over_the_map_between(multiprocessors, kernels):
    with on_multiprocessors(multiprocessors):
        sample = sample_of((2, 64, 9, 9), 64)
        assert [launch["kernel"] for launch in RUNNERS["host"].launches(op, sample)] == kernels
        check(op, RUNNERS["host"], sample, {"seed": 1})


@pytest.mark.parametrize(("side", "channels", "patch"), [(64, 320, (2, 16)), (32, 640, None)])
def test_plan_notes_moments_where_the_card_is_full(side, channels, patch):
    """Stable Diffusion 1.5 at 512²."""
    sizes = {"batch": 2, "x_channels": channels, "skip_channels": 0, "num_groups": 32, "kernel": 3, "stride": 1}
    sizes |= {"out_channels": channels, "out_height": side, "out_width": side, "alignment": 16, "out_alignment": 16}
    dtypes = {"dtype": torch.float16, "parameter_dtype": torch.float16}
    plan = conv2d.plan(**sizes, **dtypes, multiprocessors=132, moments=True)
    assert plan.patch == patch
    assert (plan.splits == 1) == (patch is not None) == ("MOMENTS=1" in plan.defines)


def test_only_the_first_convolution_notes_moments():
    launches = RUNNERS["host"].launches(op, sample_of((1, 8, 4, 4), 16))
    convolutions = [launch for launch in launches if launch["kernel"] == "conv2d_implicit_gemm"]
    assert ["MOMENTS=1" in launch["defines"] for launch in convolutions] == [False, True, False]  # first the shortcut
    assert [launch["args"][9] is None for launch in convolutions] == [True, False, True]


def test_every_dtype_is_served_on_a_card():
    with FakeTensorMode():
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert cuda_impl.reject(torch.empty(2, 8, 5, 3, device="cuda", dtype=dtype)) is None


CONVOLUTIONS = ((16, 8, 3, 3), (16, 16, 3, 3), (16, 8, 1, 1))  # of the sample below: both, and the shortcut


@pytest.mark.parametrize(
    ("fastest", "chosen"),
    [
        (("implicit_gemm",) * 3, "implicit_gemm"),
        (("implicit_gemm", "direct", "implicit_gemm"), "composed"),
        (("direct", "implicit_gemm", "implicit_gemm"), "composed"),
        (("implicit_gemm", "implicit_gemm", None), "composed"),
        (("triton 64x64",) * 3, "composed"),
        ((None,) * 3, "composed"),
    ],
    ids=str,
)
def test_measurements_of_all_convolutions_decide(monkeypatch, fastest, chosen):
    called = []
    x = torch.ones(2, 16, 5, 3).half()
    table = dict(zip(CONVOLUTIONS, fastest, strict=True))
    monkeypatch.setattr(measured, "fastest", lambda x, weight, *rest: table.get(tuple(weight.shape)))
    monkeypatch.setattr(cuda_impl, "compute", lambda *args: called.append("implicit_gemm") or x)
    monkeypatch.setattr(cuda_impl, "compose", lambda *args: called.append("composed") or x)
    monkeypatch.setattr(cuda_runtime, "multiprocessors", lambda device: 132)
    for sample in (
        FLOAT16["everything_channels_last"],
        FLOAT32["everything_channels_last"],
        FLOAT16["pruned_identity_contiguous"],
    ):
        cuda_impl.run(*arguments(**sample.kwargs).values())
    assert called == [chosen, "composed", "composed"]


def test_default_is_torchs_convolution():
    for sample in FLOAT32.values():
        check_result(op, sample, cuda_impl.run(*arguments(**sample.kwargs).values()))


# Triton's launches


def launched(sample: Sample) -> list[tuple[str, dict[str, Any]]]:
    """Kernels and their arguments."""
    steps = RUNNERS["interpreter"].launches(op, sample)
    return [(step.kernel.__name__, dict(zip(step.kernel.arg_names, step.args, strict=True))) for step in steps]


def test_small_tiles_take_the_paths_of_large_maps():
    taken = set()
    with small_tiles("resnet_block"):
        for name in RUNNERS["interpreter"].served(op, FLOAT32):
            steps = [step for step in launched(FLOAT32[name]) if step[1].get("moments_ptr") is not None]
            if steps:
                (writer, _), (_, a) = steps
                ragged = a["positions"] % a["TILE_POSITIONS"] > 0
                several = a["tiles"] * a["GROUP_CHANNELS"] > a["BLOCK_P"]
                taken.add((writer, a["tiles"] > 1, ragged, several))
                taken.add(("channels in several steps", a["GROUP_CHANNELS"] > a["BLOCK_C"]))
                (a,) = (a for kernel, a in launched(FLOAT32[name]) if kernel == "norm_coefficients")
                taken.add(("statistics in parts", a["splits"] > 1, a["TILES_PER_GROUP"] > 1))
    assert taken >= {("convolve", True, True, True), ("sum_splits", True, True, True)}
    assert taken >= {("channels in several steps", True), ("statistics in parts", True, True)}


@pytest.mark.parametrize("name", [name for name in FLOAT16 if not name.startswith(("pruned", "empty"))])
def test_no_pass_over_the_map_in_the_middle(name):
    steps = launched(FLOAT16[name])
    names = [kernel for kernel, _ in steps if kernel != "sum_splits"]
    shortcut = ["convolve"] * (names.count("convolve") - 2)
    first = ["group_statistics", "norm_coefficients", "convolve"]
    assert names == [*shortcut, *first, "moment_coefficients", "convolve"]
    # what the first convolution leaves is what is merged, and what comes of that is what the second one reads
    at = [kernel for kernel, _ in steps].index("moment_coefficients")
    writer, merge, second = (a for _, a in steps[at - 1 : at + 2])
    assert writer["moments_ptr"] is merge["moments_ptr"]
    assert writer["y_ptr"] is second["x_ptr"]
    assert merge["coefficients_ptr"] is second["coefficients_ptr"]
    assert second["moments_ptr"] is None


@pytest.mark.parametrize("name", [name for name in FLOAT16 if name.startswith(("pruned", "empty"))])
def test_blocks_without_convolutions(name):
    expected = ["convolve"] if name.startswith("pruned") and "identity" not in name else []
    assert [kernel for kernel, _ in launched(FLOAT16[name])] == expected


@pytest.mark.parametrize("runner", CARDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_unets_and_decoders_on_a_card(runner, layout, dtype):
    like = {"device": "cuda", "dtype": dtype}
    for batch, channels, skip_channels, out_channels, side in (
        (1, 320, 0, 320, 64),
        (2, 640, 320, 640, 32),
        (1, 1280, 1280, 1280, 8),
        (1, 128, 0, 128, 128),
    ):
        given = {"channel_bias": random_tensor((batch, out_channels), **like, seed=11)}
        if skip_channels:
            given["skip"] = feature_map((batch, skip_channels, side, side), layout, **like, seed=13)
        shape = (batch, channels, side, side)
        check_all(op, runner, sample_of(shape, out_channels, 32, layout, **like, **given))
