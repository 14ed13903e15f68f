"""What only the CPU backend of cond_conv2d promises: strategies, any number of threads, real sizes, its algorithms."""

import pytest
import torch

from fastsd_kernels import cond_conv2d, cpu_runtime
from fastsd_kernels.cond_conv2d import STRATEGIES, cpu_impl, op
from fastsd_kernels.conv2d import cpu_costs
from fastsd_kernels.conv2d import cpu_impl as conv2d_cpu
from fastsd_kernels.conv2d.cases import WINOGRAD_RELATIVE_L2
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.testing import Sample, check_op, feature_map

LIKE = {"device": "cpu", "dtype": torch.float32}


assert cpu_impl.unavailable() is None  # which loads the kernels


def relative_l2(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def drawn(batch, channels, height, width, out_channels, experts, layout="channels_last"):
    x = feature_map((batch, channels, height, width), layout, **LIKE)
    kernels = feature_map((experts, out_channels * channels, 3, 3), "contiguous", **LIKE, seed=1)
    kernels = kernels.view(experts, out_channels, channels, 3, 3) / (3 * channels**0.5)
    routing = feature_map((experts, channels), "contiguous", **LIKE, seed=2) / channels**0.5
    return x, kernels, {"routing_weight": routing, "padding": 1, "num_groups": 8, "activation": "silu"}


@pytest.fixture(params=["product", "winograd2", "winograd4"])
def algorithm(request, monkeypatch):
    """What is taken for every convolution that has the choice."""
    monkeypatch.setattr(cpu_costs, "cheapest", lambda call, but=(): request.param if _is_3x3(call) else "product")
    return request.param


def _is_3x3(call):
    return call.kernel == 3 and call.stride == 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_do_not_change_a_bit(algorithm, layout):
    x, experts, given = drawn(3, 96, 40, 33, 72, 3, layout)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(cond_conv2d(x, experts, **given, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(2, 320, 64, 64, 320), (3, 640, 32, 32, 640), (2, 1280, 8, 8, 1280)], ids=str)
def test_error_at_real_sizes(algorithm, shape):
    batch, channels, height, width, out_channels = shape
    x, experts, given = drawn(batch, channels, height, width, min(out_channels, 72), 3)
    exact = cond_conv2d(
        x.double(),
        experts.double(),
        **given | {"routing_weight": given["routing_weight"].double()},
        backend="reference",
    )
    assert relative_l2(cond_conv2d(x, experts, **given, backend="cpu"), exact) <= 3e-5


def test_blocks_that_hold_parts_of_several_samples(algorithm):
    """More tiles than a block holds, and a block that ends inside a sample."""
    x, experts, given = drawn(5, 48, 131, 90, 40, 2)
    exact = cond_conv2d(x.double(), experts.double(), **given, backend="reference")
    assert relative_l2(cond_conv2d(x, experts, **given, backend="cpu"), exact) <= 3e-5


@pytest.mark.parametrize("isa", cpu_runtime.ISAS)
@pytest.mark.parametrize("algorithm", ["winograd2", "winograd4"], indirect=True)
def test_every_sample_by_winograd(algorithm, isa, monkeypatch):
    """The backend takes columns for samples as small as these."""
    index = cpu_runtime.ISAS.index(isa)
    if index > cpu_runtime.isa():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setattr(cpu_runtime, "isa", lambda: index)
    for sample in op.cases.samples("cpu", torch.float32):
        check_op(op, Sample(sample.name, sample.kwargs, WINOGRAD_RELATIVE_L2), "cpu")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_strategy_that_is_asked_for_is_taken(strategy, monkeypatch):
    taken = []
    for name, function in cpu_impl._STRATEGIES.items():
        monkeypatch.setitem(cpu_impl._STRATEGIES, name, lambda *args, n=name, f=function: taken.append(n) or f(*args))
    x, experts, given = drawn(2, 16, 8, 8, 16, 2)
    cond_conv2d(x, experts, **given, strategy=strategy)
    assert taken == [strategy]


def test_the_mean_is_taken_in_the_pass_that_activates(monkeypatch):
    x, experts, given = drawn(2, 16, 9, 7, 16, 2)
    expected = cond_conv2d(x, experts, **given, backend="reference")
    monkeypatch.setattr(conv2d_cpu, "_affine", None)
    monkeypatch.setattr(cpu_impl, "prologue", None)
    torch.testing.assert_close(cond_conv2d(x, experts, **given), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("space", [(64, 64), (5, 3), (1, 1)], ids=str)
def test_means_of_the_activating_pass(dtype, space):
    """Of what it has written, as it is rounded; also beside a mean far from zero."""
    x = (feature_map((2, 24, *space), "channels_last", **LIKE) + 100).to(dtype)
    skip = feature_map((2, 8, *space), "channels_last", **LIKE).to(dtype)
    norm = (4, torch.full((32,), 0.1), torch.full((32,), 50.0), 1e-5, None, None)
    u, mean = cpu_impl._activated(x, skip, norm, "silu")
    assert u.dtype == dtype
    torch.testing.assert_close(mean, u.double().mean((2, 3)).float(), rtol=1e-6, atol=1e-6)


def test_16_bits_go_to_torchs_convolution(monkeypatch):
    taken = []
    for name, function in cpu_impl._STRATEGIES.items():
        monkeypatch.setitem(cpu_impl._STRATEGIES, name, lambda *args, n=name, f=function: taken.append(n) or f(*args))
    x, experts, given = drawn(2, 16, 8, 8, 16, 2)
    cond_conv2d(x.bfloat16(), experts.bfloat16(), **given)
    assert taken == ["mix_first"]


def test_no_choice_is_torchs_own_convolution():
    def chosen(channels, side, batch=1):
        return cpu_costs.cheapest(cpu_costs.Call(batch, channels, channels, side, side, 3, 1, 0), but=["direct"])

    assert chosen(320, 64) == chosen(640, 32, 2) == "winograd4"
    assert chosen(1280, 8) == "winograd2"
    assert chosen(16, 1) == "product"  # torch's by itself


def test_refusals():
    x, experts, given = drawn(2, 16, 8, 8, 16, 2)
    with pytest.raises(BackendUnavailable, match="float64"):
        cond_conv2d(x.double(), experts.double(), **given, backend="cpu")
    assert "needs CPU tensors" in op.backends["cpu"].reject(x.to("meta"))


def test_what_the_kernel_refuses():
    """Sizes that would have it read or write past a tensor."""
    x, out = torch.randn(2, 8, 4, 4), torch.empty(2, 8, 4, 4)
    source = torch.arange(6, dtype=torch.int32) - 1
    experts, alpha = torch.randn(3, 8, 8, 3, 3), torch.randn(2, 3)

    def convolve(experts=experts, alpha=alpha):
        given = (None, None, False, source, source, experts, 4, 3, 1, None, None, None, 1.0, 0)
        torch.ops.fastsd_cpu.conv2d.default(x, *given, out, alpha)

    convolve()
    with pytest.raises(ValueError, match="weights: expected"):
        convolve(experts=experts[:2])
    with pytest.raises(ValueError, match="alpha: expected"):
        convolve(alpha=alpha[:1])
