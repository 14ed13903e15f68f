"""What only the CPU backend promises: the choice of an algorithm, any number of threads, real sizes, NaN and Inf."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fastsd_kernels import conv2d, cpu_runtime
from fastsd_kernels.conv2d import cpu_costs, op
from fastsd_kernels.conv2d.cases import WINOGRAD_RELATIVE_L2
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.testing import feature_map

LIKE = {"device": "cpu", "dtype": torch.float32}
WINOGRAD = ("winograd2", "winograd4")
WEIGHT_LAYOUTS = {
    "contiguous": lambda weight: weight,
    "channels_last": lambda weight: weight.contiguous(memory_format=torch.channels_last),
    "every_other_channel": lambda weight: torch.stack([weight, weight], 2).flatten(1, 2)[:, ::2],
    "transposed": lambda weight: weight.transpose(0, 1).contiguous().transpose(0, 1),
}


def relative_l2(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("algorithm", ["product", *WINOGRAD])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("channels", "size"), [((96, 64), (40, 33)), ((1000, 600), (19, 14))], ids=["large map", "many channels"]
)
def test_threads_do_not_change_a_bit(channels, size, layout, algorithm):
    x, skip = (feature_map((3, count, *size), layout, **LIKE, seed=1) for count in channels)
    weight = feature_map((72, sum(channels), 3, 3), "contiguous", **LIKE) / (3 * sum(channels) ** 0.5)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            given = {"padding": 1, "skip": skip, "num_groups": 32, "activation": "silu", "algorithm": algorithm}
            results.append(conv2d(x, weight, backend="cpu", **given))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("algorithm", WINOGRAD)
@pytest.mark.parametrize("shape", [(2, 320, 64, 64, 320), (1, 2560, 16, 16, 1280), (1, 1280, 8, 8, 1280)], ids=str)
def test_error_at_real_sizes(shape, algorithm):
    batch, channels, height, width, out_channels = shape
    x = feature_map((batch, channels, height, width), "channels_last", **LIKE)
    weight = feature_map((out_channels, channels, 3, 3), "contiguous", **LIKE)[:64] / (3 * channels**0.5)
    given = {"padding": 1, "num_groups": 32, "activation": "silu"}
    exact = conv2d(x.double(), weight.double(), **given, backend="reference")
    assert relative_l2(conv2d(x, weight, **given, algorithm=algorithm, backend="cpu"), exact) <= 3e-5


def test_a_large_map_is_cut_into_blocks():
    """More tiles than a block holds, in rows of more tiles than a strip, and a map that no tile divides."""
    x = feature_map((1, 48, 301, 421), "channels_last", **LIKE)
    weight = feature_map((40, 48, 3, 3), "contiguous", **LIKE) / 20
    exact = conv2d(x.double(), weight.double(), padding=1, backend="reference")
    for algorithm in WINOGRAD:
        assert relative_l2(conv2d(x, weight, padding=1, algorithm=algorithm, backend="cpu"), exact) <= 3e-5


@pytest.mark.parametrize("isa", cpu_runtime.ISAS)
@pytest.mark.parametrize("algorithm", WINOGRAD)
@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
@pytest.mark.parametrize(("channels", "out_channels"), [(19, 1), (229, 33), (515, 7), (1601, 40)])
def test_weights_of_every_layout_and_size(channels, out_channels, layout, algorithm, isa, monkeypatch):
    """Channels that fill no vector and no panel, and more of them than are transformed at once, for several blocks."""
    index = cpu_runtime.ISAS.index(isa)
    if index > cpu_runtime.isa():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setattr(cpu_runtime, "isa", lambda: index)
    x = feature_map((2, channels, 33, 30), "channels_last", **LIKE)
    weight = feature_map((out_channels, channels, 3, 3), "contiguous", **LIKE, seed=1) / (3 * channels**0.5)
    laid_out = WEIGHT_LAYOUTS[layout](weight)
    assert torch.equal(laid_out, weight)
    y = conv2d(x, laid_out, padding=1, algorithm=algorithm, backend="cpu")
    exact = conv2d(x.double(), weight.double(), padding=1, backend="reference")
    assert relative_l2(y, exact) <= WINOGRAD_RELATIVE_L2


@pytest.mark.parametrize("algorithm", ["product", *WINOGRAD])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [20, 1601])
def test_weights_that_are_edited_between_calls(channels, layout, algorithm):
    """However small the edit, and whether or not torch knows of it."""
    x = feature_map((1, channels, 9, 10), "channels_last", **LIKE)
    weight = WEIGHT_LAYOUTS[layout](feature_map((33, channels, 3, 3), "contiguous", **LIKE) / (3 * channels**0.5))

    def convolve():
        return conv2d(x, weight, padding=1, algorithm=algorithm, backend="cpu")

    first = convolve()
    version, address = weight._version, weight.data_ptr()
    weight.data[32, channels - 1, 1, 1] += 50
    second = convolve()
    assert (weight._version, weight.data_ptr()) == (version, address)
    # the tap in the middle adds a multiple of one channel to another
    expected = first.double()
    expected[:, 32] += 50 * x[:, -1].double()
    assert relative_l2(second, expected) <= WINOGRAD_RELATIVE_L2
    assert relative_l2(second, first.double()) > 0.1
    weight.data[32, channels - 1, 1, 1] -= 50
    third = convolve()
    assert relative_l2(third, first.double()) <= WINOGRAD_RELATIVE_L2


def resident_bytes():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells how much memory a process has")
@pytest.mark.parametrize("algorithm", ["product", *WINOGRAD])
def test_nothing_is_kept_of_weights(algorithm):
    x = feature_map((1, 320, 8, 8), "channels_last", **LIKE)
    weights = [feature_map((320, 320, 3, 3), "contiguous", **LIKE, seed=seed) for seed in range(16)]

    def convolve():
        for weight in weights:
            conv2d(x, weight, padding=1, algorithm=algorithm, backend="cpu")

    conv2d(x, weights[0].clone(), padding=1, algorithm=algorithm, backend="cpu")
    before = resident_bytes()
    convolve()
    convolve()
    assert resident_bytes() - before < sum(weight.nbytes for weight in weights) / 4


@pytest.mark.parametrize("algorithm", WINOGRAD)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_tiles(value, algorithm):
    """Winograd's tiles share their sums: NaN and infinities make NaN of whole tiles, and of nothing else."""
    x = feature_map((1, 16, 24, 24), "channels_last", **LIKE).clone()
    x[0, 3, 9, 9] = value
    weight = feature_map((8, 16, 3, 3), "contiguous", **LIKE)
    y = conv2d(x, weight, padding=1, algorithm=algorithm, backend="cpu")
    plain = conv2d(x, weight, padding=1, backend="reference")
    assert not torch.isfinite(y[~torch.isfinite(plain)]).any()
    tile = int(algorithm[-1])
    spread = torch.isfinite(y[0]).all(0).logical_not().nonzero()
    assert spread.min() >= (8 // tile) * tile
    assert spread.max() < (10 // tile + 1) * tile


def call(channels, side, kernel=3, stride=1):
    return cpu_costs.Call(1, channels, channels, side, side, kernel, stride, 0)


@pytest.mark.parametrize(("channels", "side"), [(320, 64), (640, 32), (1280, 16)])
def test_large_maps_by_f4x4(channels, side):
    assert cpu_costs.cheapest(call(channels, side)) == "winograd4"


@pytest.mark.parametrize("channels", [320, 1280])
def test_small_maps_by_winograd(channels):
    """Transforming the weights pays even for a few tiles; torch's convolution reorders them, which takes longer."""
    assert cpu_costs.cheapest(call(channels, 8)) in WINOGRAD
    assert cpu_costs.cheapest(call(channels, 8), but=WINOGRAD) == "product"


def test_f4x4_only_where_time_counts():
    """Its rounding errors are larger, and a convolution as small as this takes next to no time."""
    small = call(64, 16)
    assert cpu_costs.cheapest(small) == "winograd2"
    assert cpu_costs.cost("winograd4", small) < cpu_costs.cost("winograd2", small)


def test_few_channels_by_torch():
    assert cpu_costs.cheapest(cpu_costs.Call(1, 4, 320, 64, 64, 3, 1, 0)) == "direct"
    assert cpu_costs.cheapest(cpu_costs.Call(1, 320, 4, 64, 64, 3, 1, 0)) == "direct"


def test_columns_where_winograd_cannot():
    """With few positions, or with passes around torch's convolution that columns do not need."""
    assert cpu_costs.cheapest(call(1280, 8, stride=2)) == "product"
    assert cpu_costs.cheapest(call(1280, 8, kernel=1)) == "product"
    alone = call(128, 256, kernel=1)
    assert cpu_costs.cheapest(alone) == "direct"
    assert cpu_costs.cheapest(dataclasses.replace(alone, extra_bytes=3 * 4 * 128 * 256**2)) == "product"


def test_only_plain_float32_is_transformed(monkeypatch):
    seen = []
    monkeypatch.setattr(cpu_costs, "cheapest", lambda *args: seen.append(args) or "winograd2")
    x, weight = torch.randn(1, 8, 8, 8), torch.randn(8, 8, 3, 3)
    conv2d(x.bfloat16(), weight.bfloat16(), padding=1)
    conv2d(x[:0], weight, padding=1)
    mkldnn = torch.backends.mkldnn
    for setting in (mkldnn.matmul, mkldnn.conv):
        before, setting.fp32_precision = setting.fp32_precision, "bf16"
        try:
            conv2d(x, weight, padding=1)
        finally:
            setting.fp32_precision = before
    assert not seen
    conv2d(x, weight, padding=1)
    assert len(seen) == 1


def test_refusals():
    x, weight = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 3, 3)
    with pytest.raises(BackendUnavailable, match="float64"):
        conv2d(x.double(), weight.double(), backend="cpu")
    with pytest.raises(BackendUnavailable, match=r"stride is 2; winograd4 takes stride 1, use algorithm='product'"):
        conv2d(x, weight, stride=2, algorithm="winograd4", backend="cpu")
    with pytest.raises(BackendUnavailable, match=r"\(8, 8, 1, 1\); winograd2 takes 3×3"):
        conv2d(x, weight[..., :1, :1], algorithm="winograd2", backend="cpu")
    with pytest.raises(BackendUnavailable, match="'implicit_gemm'; the cpu backend has direct"):
        conv2d(x, weight, algorithm="implicit_gemm", backend="cpu")
    meta = op.backends["cpu"].reject(x.to("meta"), weight.to("meta"), None, 1, None)
    assert "needs CPU tensors" in meta
