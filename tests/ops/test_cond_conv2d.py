"""What is particular to cond_conv2d: oracles of its definition, strategies, which passes it takes, its algorithms."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from fastsd_kernels import cond_conv2d
from fastsd_kernels.cond_conv2d import STRATEGIES, cases, cpu_impl, cuda_impl, op
from fastsd_kernels.conv2d import cpu_costs
from fastsd_kernels.conv2d import cpu_impl as conv2d_cpu
from fastsd_kernels.conv2d.cases import WINOGRAD_RELATIVE_L2
from fastsd_kernels.testing import Sample, check_result, feature_map
from fastsd_kernels.testing.inputs import random_tensor
from tests.contract import covering
from tests.contract.check import check_all
from tests.runners import RUNNERS, host, protocol
from tests.runners.interpreter import small_tiles
from tests.runners.launches import named

CPU, HOST, INTERPRETER = (RUNNERS[name] for name in ("cpu", "host", "interpreter"))
WAYS = [(HOST, "mix_first"), *((INTERPRETER, strategy) for strategy in STRATEGIES)]
DOUBLE, FLOAT32 = {"dtype": torch.float64}, {"device": "cpu", "dtype": torch.float32}
triton_impl = op.backends["triton"].module


def sample_of(name, dtype=torch.float16, **changes):
    return Sample(name, covering.samples(op, "cpu", dtype)[name].kwargs | changes)


# --- the definition


@pytest.fixture
def case():
    torch.manual_seed(0)
    return torch.randn(2, 6, 7, 5, **DOUBLE), torch.randn(3, 4, 6, 3, 3, **DOUBLE), torch.randn(3, 4, **DOUBLE)


@pytest.mark.parametrize("alpha", [torch.eye(3)[[1, 2]].double(), torch.randn(2, 3, **DOUBLE)], ids=("one", "several"))
def test_mixing_kernels_is_mixing_plain_convolutions(case, alpha):
    x, experts, biases = case
    y = cond_conv2d(x, experts, biases, alpha, padding=1, backend="reference")
    each = torch.stack([F.conv2d(x, w, b, padding=1) for w, b in zip(experts, biases, strict=True)])
    torch.testing.assert_close(y, torch.einsum("be,ebkhw->bkhw", alpha, each))


@pytest.mark.parametrize(("routing", "act"), [("sigmoid", torch.sigmoid), ("softmax", lambda z: z.softmax(1))])
def test_routing_reads_the_mean_of_what_is_convolved(case, routing, act):
    x, experts, _ = case
    weight, bias, offset = torch.randn(3, 6, **DOUBLE), torch.randn(3, **DOUBLE), torch.randn(1, 3, **DOUBLE)
    given = {"padding": 1, "num_groups": 3, "activation": "silu", "backend": "reference"}
    alpha = offset + act(F.silu(F.group_norm(x, 3)).mean((2, 3)) @ weight.T + bias)
    routed = cond_conv2d(x, experts, alpha=offset, routing_weight=weight, routing_bias=bias, routing=routing, **given)
    torch.testing.assert_close(routed, cond_conv2d(x, experts, alpha=alpha, **given))


def test_second_gradients(case):
    x, experts, _ = case
    x, experts = x[:, :, :3, :2].clone().requires_grad_(), experts.clone().requires_grad_()
    torch.autograd.gradgradcheck(
        lambda x, w, r: cond_conv2d(x, w, routing_weight=r, padding=1, num_groups=3, eps=1e-3, activation="silu"),
        (x, experts, torch.randn(3, 6, **DOUBLE, requires_grad=True)),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_the_dtype_in_force(dtype):
    x, experts, alpha = torch.randn(1, 8, 5, 5), torch.randn(2, 8, 8, 3, 3), torch.ones(1, 2)
    with torch.autocast("cpu", dtype):
        assert cond_conv2d(x, experts, alpha=alpha, padding=1).dtype == dtype
    assert cond_conv2d(x, experts, alpha=alpha, padding=1).dtype == torch.float32


@pytest.mark.parametrize(("runner", "strategy"), [(CPU, "mix_first"), *WAYS])
def test_the_mean_is_that_of_the_rounded_map(runner, strategy):
    """A logit that is 0 for the mean of what is convolved, and far from it for that of what was not rounded yet."""
    bias = torch.full((8,), 0.3).half()
    u = F.silu(bias.float())
    assert (u.half() != u).all()
    routing = {"routing_weight": 2.0**20 * torch.eye(1, 8), "routing_bias": -(2.0**20) * u[:1].half().float()}
    norm = {"num_groups": 1, "norm_bias": bias, "activation": "silu", "strategy": strategy}
    given = {"x": torch.full((1, 8, 4, 8), 3.0).half(), "experts": torch.eye(8).half()[None, ..., None, None]}
    setting = {name: values[-1] for name, values in runner.settings.items()}
    y = runner.run(op, Sample("", given | routing | norm), setting)
    assert torch.equal(y, (u.half() / 2)[None, :, None, None].expand_as(y))


# --- launches

STEPS = {"group_statistics": "statistics", "norm_coefficients": "coefficients", "conv2d_coefficients": "coefficients"}
STEPS |= {"group_norm_silu_stats": "statistics", "conv2d_implicit_gemm": "convolve", "convolve": "convolve"}
STEPS |= {prefix + name: name for prefix in ("", "cond_conv2d_") for name in ("activate", "route", "mix")}


def steps(runner, sample):
    """The arguments of each launch by name; sums of splits are left out."""
    return {STEPS[kernel]: args for kernel, args in map(named, runner.launches(op, sample)) if kernel in STEPS}


def same(a, b):
    return a.data_ptr() == b.data_ptr()


@pytest.mark.parametrize(("runner", "strategy"), WAYS)
def test_norm_and_activation_are_in_one_pass_over_the_map(runner, strategy):
    """With routing in one before the convolution, without in the convolution."""
    norm, mix, silu = ["statistics", "coefficients"], ["mix"] if strategy == "mix_first" else [], "SILU"
    if runner is HOST:
        silu = "activate"
    taken = steps(runner, sample_of("everything_contiguous", strategy=strategy))
    assert [*taken] == [*norm, "activate", "route", *mix, "convolve"]
    activate, route, convolve = (taken[step] for step in ("activate", "route", "convolve"))
    assert same(activate["sums"], route["sums"])
    assert same(activate["u"], convolve["x"])
    assert same(route["rows"], convolve["channel_bias"])
    assert convolve["coefficients"] is None
    assert not convolve[silu]

    taken = steps(runner, sample_of("mix_first_8x8_contiguous", strategy=strategy))
    # in CUDA the convolution's variant merges the statistics, after the weights are there
    assert [*taken] == ["route", *mix, *norm, "convolve"] if runner is HOST else [*norm, "route", *mix, "convolve"]
    assert same(taken["convolve"]["coefficients"], taken["coefficients"]["coefficients"])
    assert taken["convolve"][silu]


@pytest.mark.parametrize("runner", [HOST, INTERPRETER])
def test_what_is_not_needed_is_left_out(runner):
    bare = {"num_groups": 0, "norm_weight": None, "norm_bias": None, "activation": "none", "strategy": "mix_first"}
    # one alpha for all samples: one mixture, and a plain convolution; in Triton an alpha in float32 is read as it is
    shared = bare | {"alpha": torch.tensor([[0.0, 1.0, 0.0]])}
    taken, route = steps(runner, sample_of("one_hot_contiguous", **shared)), ["route"] if runner is HOST else []
    assert [*taken] == [*route, "mix", "convolve"]
    assert taken["mix"]["mixed"].shape[0] == 1
    assert not taken["convolve"]["weight_stride"]
    if runner is INTERPRETER:
        assert [*steps(runner, sample_of("one_hot_contiguous", **shared | {"strategy": "concat"}))] == ["convolve"]
    # what is convolved is there: it is summed up, and not written
    taken = steps(runner, sample_of("one_hot_contiguous", **bare, routing_weight=torch.ones(3, 16)))
    assert [*taken] == ["activate", "route", "mix", "convolve"]
    assert taken["activate"]["u"] is None
    assert taken["convolve"]["weight_stride"]


@pytest.mark.parametrize(
    ("runner", "strategy", "step", "argument"),
    [
        (HOST, "mix_first", "mix", "experts"),
        *((INTERPRETER, *rest) for rest in (("mix_first", "mix", "experts"), ("concat", "convolve", "weight"))),
    ],
)
def test_experts_with_channels_innermost_are_not_copied(runner, strategy, step, argument):
    rows = torch.zeros(3, 8, 3, 3, 16).half()
    given = {"x": torch.zeros(2, 16, 6, 5).half(), "experts": rows.movedim(-1, 2), "alpha": torch.ones(1, 3)}
    assert same(steps(runner, Sample("", given | {"strategy": strategy}))[step][argument], rows)


def test_weights_of_each_sample_are_split_too():
    convolve = steps(HOST, sample_of("mix_first_6x5_channels_last"))["convolve"]
    assert convolve["skip"] is not None
    assert convolve["weight"].shape == (2, 40, 9, 32)
    assert convolve["workspace"].shape[0] == 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_large_batches_stay_on_the_one_long_grid_axis(strategy):
    (sample,) = cases.large_samples("cpu", torch.float16)
    launches = INTERPRETER.launches(op, Sample("", sample.kwargs | {"strategy": strategy}))
    assert all(len(launch.grid) == 1 and 1 <= launch.grid[0] < 2**31 for launch in launches)


@pytest.mark.parametrize(
    ("channels", "side", "strategy"),
    [(320, 64, "mix_first"), (640, 32, "mix_first"), (1280, 16, "mix_in_loop"), (1280, 8, "concat")],
)
def test_default_strategy_in_triton(channels, side, strategy, monkeypatch):
    """Stable Diffusion 1.5 at 512², three experts."""
    sizes = (9 * channels * channels, side * side, 2)
    assert [triton_impl.chosen(batch, batch, 3, *sizes) for batch in (1, 2)] == [strategy, strategy]
    assert triton_impl.chosen(2, 2, triton_impl.MOST_EXPERTS + 1, *sizes) == "mix_first"
    monkeypatch.setattr(triton_impl, "chosen", lambda *args: strategy)
    taken = steps(INTERPRETER, sample_of("plain_contiguous"))
    assert (("mix" in taken), taken["convolve"]["CONCAT"]) == (strategy == "mix_first", strategy == "concat")


# --- plans and refusals


def plan(**changes):
    """The plan in CUDA of 320 channels on 64 × 64 positions with three experts."""
    given = {"batch": 2, "x_channels": 320, "skip_channels": 0, "space": 64 * 64, "count": 3, "weights": 9 * 320 * 320}
    given |= {"mixtures": 2, "rows": 2, "dtype": torch.float16, "parameter_dtype": torch.float16}
    given |= {"alignment": 16, "expert_alignment": 16, "multiprocessors": host.MULTIPROCESSORS}
    return cuda_impl.plan(**given | changes)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("channels", "side"), [(320, 64), (640, 32), (1280, 16), (1280, 8)])
def test_plan_fills_the_card_with_16_byte_accesses(channels, side, batch):
    of = {"x_channels": channels, "space": side * side, "weights": 9 * channels**2}
    p = plan(batch=batch, mixtures=batch, rows=batch, **of)
    assert {"VECTOR=8", "MIX_VECTOR=8", "HELD=3"} <= set(p.defines)
    assert p.activate.grid[0] >= 40
    assert p.mix.grid[0] >= host.MULTIPROCESSORS
    assert p.samples_per_block == batch  # the experts are read once


@pytest.mark.parametrize(
    ("changes", "defines"),
    [
        # rows are not aligned
        ({"alignment": 8}, ("VECTOR=4", "MIX_VECTOR=8")),
        ({"expert_alignment": 2}, ("VECTOR=8", "MIX_VECTOR=1")),
        ({"x_channels": 316, "skip_channels": 4}, ("VECTOR=4",)),
        ({"x_channels": 319}, ("VECTOR=1",)),
        ({"weights": 4}, ("MIX_VECTOR=4",)),
        ({"count": 100}, ("HELD=8",)),
        # near the limits of a launch
        ({"batch": 65537, "space": 4, "mixtures": 65537, "rows": 65537}, ("VECTOR=8",)),
        ({"batch": 1, "space": 2**30, "mixtures": 1, "rows": 1}, ("VECTOR=8",)),
        ({"batch": 1, "x_channels": 1, "space": 1, "weights": 1, "mixtures": 1, "rows": 1}, ("MIX_VECTOR=1",)),
        ({"x_channels": 2**20, "weights": 2**35}, ("MIX_VECTOR=8",)),
        ({"multiprocessors": 1}, ("VECTOR=8",)),
        ({"multiprocessors": 10**5}, {"VECTOR=8"}),
    ],
    ids=str,
)
def test_plan_narrows_accesses_and_stays_within_the_limits_of_a_launch(changes, defines):
    p = plan(**changes)
    assert set(defines) <= set(p.defines)
    for launch in (p.activate, p.route, p.mix):
        assert 0 < launch.grid[0] < 2**31
        assert (launch.grid[1:], launch.block) == ((1, 1), (256, 1, 1))
        assert launch.shared_bytes <= 8 * 1024


MAP, NINE = torch.ones(1, 8, 4, 4).half(), torch.ones(9, 8, 8, 3, 3).half()


@pytest.mark.parametrize(
    ("backend", "changes", "words"),
    [
        ("cuda", {"strategy": "concat"}, "'concat'; the cuda backend has 'mix_first'; use backend='triton'"),
        ("cuda", {"strategy": "mix_in_loop"}, "'mix_in_loop'; the cuda backend has 'mix_first'"),
        ("cuda", {"x": MAP.float(), "experts": NINE.float()}, "the cuda backend takes float16 and bfloat16"),
        ("cuda", {"x": MAP.expand(2**29, -1, -1, -1)}, "x has 536870912 samples"),
        ("triton", {"strategy": "concat"}, "up to 8 experts with strategy='concat'; got 9; use strategy='mix_first'"),
        ("triton", {"strategy": "mix_in_loop"}, "up to 8 experts with strategy='mix_in_loop'; got 9"),
    ],
)
def test_refusals(backend, changes, words):
    given = {"x": MAP, "experts": NINE, "alpha": torch.ones(1, 9), "padding": 1}
    with host.as_a_card(None), mock.patch.object(triton_impl, "unavailable", return_value=None):
        assert words in protocol.refusal(op, Sample("", given | changes), backend)


@pytest.mark.parametrize("runner", [CPU, HOST, INTERPRETER])
def test_no_other_sample_is_refused(runner):
    """Which would leave it out of the contract's tests."""
    for dtype in cuda_impl.DTYPES if runner is HOST else runner.dtypes:
        samples = covering.samples(op, "cpu", dtype)
        served = runner.served(op, samples)
        others = ("mix_in_loop", "concat") if runner is HOST else ()
        others = op.cases.NOT_INTERPRETED if runner is INTERPRETER else others
        assert {*served} == {name for name in samples if not name.startswith(others)}


# --- samples that take the paths of large inputs

ON_A_SMALL_CARD = ("many_samples_routed_channels_last", "many_experts_routed_contiguous", "crowd_contiguous")
ON_A_SMALL_CARD += ("many_tiles_routed_channels_last", "off_vector_width_routed_contiguous")
ON_A_SMALL_CARD += ("mix_first_9x22_channels_last_routed",)


@pytest.fixture
def small_card(monkeypatch):
    """A block has several samples, and a long chunk of positions."""
    monkeypatch.setattr(host, "MULTIPROCESSORS", 1)


@pytest.mark.usefixtures("small_card")
@pytest.mark.parametrize("name", ON_A_SMALL_CARD)
def test_contract_on_a_small_card(name):
    check_all(op, HOST, sample_of(name))


@pytest.mark.usefixtures("small_card")
def test_small_cards_take_the_paths_of_large_batches():
    paths = set()
    for launch in (launch for name in ON_A_SMALL_CARD for launch in HOST.launches(op, sample_of(name))):
        kernel, a = named(launch)
        if kernel == "cond_conv2d_activate":
            paths.add((kernel, a["chunk"] > 32, a["chunks"] > 1 and a["space"] % a["chunk"] > 0))
        if kernel == "cond_conv2d_mix":
            held = int(launch["defines"][-1].removeprefix("HELD="))
            paths.add((kernel, a["samples_per_block"] > 1, a["count"] > held))
    assert ("cond_conv2d_activate", True, True) in paths
    assert {("cond_conv2d_mix", True, True), ("cond_conv2d_mix", True, False)} <= paths


def test_small_tiles_take_the_paths_of_large_maps():
    paths, samples = set(), covering.samples(op, "cpu", torch.float32)
    with small_tiles("cond_conv2d"):
        served = [samples[name] for name in INTERPRETER.served(op, samples)]
        launches = [named(launch) for sample in served for launch in INTERPRETER.launches(op, sample)]
    for kernel, a in launches:
        if kernel == "activate":
            ragged = a["positions"] % a["BLOCK_S"] > 0 and a["skip_channels"] % a["BLOCK_C"] > 0
            paths.add((kernel, a["row_tiles"] > 1, a["x_tiles"] > 1, a["column_tiles"] - a["x_tiles"] > 1, ragged))
        if kernel == "route" and a["sums"] is not None:
            several = a["channels"] > a["BLOCK_C"], a["row_tiles"] > a["BLOCK_T"], a["out_channels"] > a["BLOCK_K"]
            paths.add((kernel, *several))
        if kernel == "mix":
            some = 1 < a["samples_per_program"] < a["samples"]
            paths.add((kernel, a["blocks"] > 1, some, a["EXPERTS"] > a["BLOCK_E"]))
        if kernel == "convolve" and a["weight_stride"] is not None:
            ways = a["alpha"] is not None, a["CONCAT"], a["splits"] > 1, a["skip"] is not None
            paths.add((kernel, *ways))
    assert paths >= {
        *(("activate", True, True, *rest) for rest in ((True, False), (False, True))),
        ("route", True, True, True),
        *(("mix", True, *rest) for rest in ((False, True), (True, True), (True, False))),
        *(("convolve", *way, True, skip) for way in ((False, False), (True, False), (True, True)) for skip in (0, 1)),
    }


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("runner", "strategy", "dtype"),
    [("card-triton", strategy, dtype) for strategy in (None, *STRATEGIES) for dtype in RUNNERS["card-triton"].dtypes]
    + [("card-cuda", None, dtype) for dtype in cuda_impl.DTYPES],
)
@pytest.mark.parametrize(("channels", "side"), [(320, 64), (640, 32), (1280, 16), (1280, 8)])
def test_convolutions_of_unets_on_a_card(runner, strategy, dtype, channels, side):
    like = {"device": "cuda", "dtype": dtype}
    given = {
        "experts": random_tensor((3, channels, channels, 3, 3), **like) * (9 * channels) ** -0.5,
        "expert_biases": random_tensor((3, channels), **like),
        "routing_weight": random_tensor((3, channels), **like) * channels**-0.5,
        "channel_bias": random_tensor((2, channels), **like),
    } | {"padding": 1, "num_groups": 32, "activation": "silu", "strategy": strategy}
    for layout in ("contiguous", "channels_last"):
        x = feature_map((2, channels, side, side), layout, **like)
        check_all(op, RUNNERS[runner], Sample(layout, {"x": x, **given}))


# --- CPU

ALGORITHMS = ("product", "winograd2", "winograd4")


def forced(algorithm):
    """It is taken for every convolution that has the choice."""
    return mock.patch.object(
        cpu_costs, "cheapest", lambda call, but=(): algorithm if call.kernel == 3 and call.stride == 1 else "product"
    )


def drawn(batch, channels, height, width, out_channels, count, layout="channels_last"):
    experts = random_tensor((count, out_channels, channels, 3, 3), **FLOAT32, seed=1) / (3 * channels**0.5)
    routing_weight = random_tensor((count, channels), **FLOAT32, seed=2) / channels**0.5
    given = {"experts": experts, "routing_weight": routing_weight, "padding": 1, "num_groups": 8, "activation": "silu"}
    return Sample("", {"x": feature_map((batch, channels, height, width), layout, **FLOAT32), **given})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_do_not_change_a_bit(algorithm, layout):
    sample, isa = drawn(3, 96, 40, 33, 72, 3, layout), CPU.settings["isa"][-1]
    with forced(algorithm):
        first, *others = (CPU.run(op, sample, {"isa": isa, "threads": number}) for number in (1, 2, 5))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    "shape",
    # in the last one more tiles than a block holds, and a block that ends inside a sample
    [(2, 320, 64, 64, 72, 3), (3, 640, 32, 32, 72, 3), (2, 1280, 8, 8, 72, 3), (5, 48, 131, 90, 40, 2)],
    ids=str,
)
def test_error_at_real_sizes(shape):
    sample = drawn(*shape)
    exact = protocol.call(op, sample.map_tensors(torch.Tensor.double), "reference")
    for algorithm in ALGORITHMS:
        with forced(algorithm):
            error = protocol.call(op, sample, "cpu").double() - exact
        assert error.norm() <= 3e-5 * exact.norm(), algorithm


@pytest.mark.parametrize("isa", CPU.settings["isa"])
@pytest.mark.parametrize("algorithm", ALGORITHMS[1:])
def test_every_sample_by_winograd(algorithm, isa):
    """The backend takes columns for samples as small as these."""
    for name, sample in covering.samples(op, "cpu", torch.float32).items():
        with forced(algorithm):
            actual = CPU.run(op, sample, {"isa": isa, "threads": 1})
        check_result(op, Sample(name, sample.kwargs, WINOGRAD_RELATIVE_L2), actual)


@pytest.mark.parametrize(
    ("dtype", "asked", "expected"),
    [*((torch.float32, strategy, strategy) for strategy in STRATEGIES), (torch.bfloat16, None, "mix_first")],
    ids=str,
)
def test_strategy_that_is_taken(dtype, asked, expected, monkeypatch):
    """The one that is asked for; 16 bits go to torch's convolution."""
    taken = []
    for name, function in cpu_impl._STRATEGIES.items():
        monkeypatch.setitem(cpu_impl._STRATEGIES, name, lambda *args, n=name, f=function: taken.append(n) or f(*args))
    sample = drawn(2, 16, 8, 8, 16, 2).map_tensors(lambda tensor: tensor.to(dtype))
    protocol.call(op, Sample("", sample.kwargs | {"strategy": asked}), "cpu")
    assert taken == [expected]


def test_the_mean_is_taken_in_the_pass_that_activates(monkeypatch):
    sample = drawn(2, 16, 9, 7, 16, 2)
    expected = protocol.call(op, sample, "reference")
    monkeypatch.setattr(conv2d_cpu, "_affine", None)
    monkeypatch.setattr(cpu_impl, "prologue", None)
    torch.testing.assert_close(protocol.call(op, sample, "cpu"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("space", [(64, 64), (5, 3), (1, 1)], ids=str)
def test_means_of_the_activating_pass(dtype, space):
    """Of what it has written, as it is rounded; also beside a mean far from zero."""
    x = (feature_map((2, 24, *space), "channels_last", **FLOAT32) + 100).to(dtype)
    skip = feature_map((2, 8, *space), "channels_last", **FLOAT32).to(dtype)
    norm = (4, torch.full((32,), 0.1), torch.full((32,), 50.0), 1e-5, None, None)
    u, mean = cpu_impl._activated(x, skip, norm, "silu")
    assert u.dtype == dtype
    torch.testing.assert_close(mean, u.double().mean((2, 3)).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "channels", "side", "algorithm"),
    # one pixel is torch's by itself
    [(1, 320, 64, "winograd4"), (2, 640, 32, "winograd4"), (1, 1280, 8, "winograd2"), (1, 16, 1, "product")],
)
def test_no_choice_is_torchs_own_convolution(batch, channels, side, algorithm):
    call = cpu_costs.Call(batch, channels, channels, side, side, 3, 1, 0)
    assert cpu_costs.cheapest(call, but=["direct"]) == algorithm


@pytest.mark.parametrize(("wrong", "words"), [("experts", "weights: expected"), ("alpha", "alpha: expected")])
def test_sizes_with_which_the_kernel_would_leave_a_tensor(wrong, words):
    x, out, source = torch.randn(2, 8, 4, 4), torch.empty(2, 8, 4, 4), torch.arange(6, dtype=torch.int32) - 1

    def convolve(experts=3, alpha=2):
        weights, geometry = torch.randn(experts, 8, 8, 3, 3), (None, None, False, source, source)
        rest = (4, 3, 1, None, None, None, 1.0, 0, out, torch.randn(alpha, 3))
        torch.ops.fastsd_cpu.conv2d.default(x, *geometry, weights, *rest)

    convolve()
    with pytest.raises(ValueError, match=words):
        convolve(**{wrong: {"experts": 2, "alpha": 1}[wrong]})
