"""cond_conv2d in Triton: interpreted on the CPU, compiled for cards that are not here, and run on one that is."""

import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd_kernels import cond_conv2d
from fastsd_kernels.cond_conv2d import STRATEGIES, cases, op
from fastsd_kernels.conv2d import op as conv2d_op
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.testing import Sample, check_op, feature_map, named
from fastsd_kernels.testing.inputs import random_tensor
from tests.proving import interpreter

triton_impl, conv2d_impl = (of.backends["triton"].module for of in (op, conv2d_op))
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile; unset it", allow_module_level=True)
triton_aot = pytest.importorskip("tests.budgets.triton_aot", reason="Triton is not installed")

from tests.budgets.ops.cond_conv2d import triton_launches  # noqa: E402

ROOT = Path(__file__).parents[2]
SAMPLES = [sample.name for sample in cases.samples("cpu", torch.float32)]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Of conv2d: several tiles of either kind, splits that begin or end at the seam of x and skip
SMALL_TILES = {
    "MOST_M": 16,
    "MOST_N": 16,
    "MOST_K": 16,
    "FEWEST_PROGRAMS": 24,
    "FEWEST_STEPS": 4,
    "SUM_M": 8,
    "SUM_N": 4,
}
# And of this op: tiles of positions and channels, the last of either ragged, several steps of routing, and a mixture
# of some of the samples in each program
SMALL_STEPS = {
    "ACTIVATE_S": 16,
    "ACTIVATE_C": 8,
    "FEWEST_PROGRAMS": 24,
    "ROUTE_C": 8,
    "ROUTE_T": 2,
    "ROUTE_K": 16,
    "MIX_BLOCK": 256,
    # what has no strategy mixes first
    "FLOAT32_PRODUCTS_A_BYTE": 1,
    "TILE_POSITIONS": 1,
}
SMALL_TILE_SAMPLES = (
    *(f"{strategy}_6x5_channels_last{routed}" for strategy in STRATEGIES for routed in ("", "_routed")),
    "many_samples_routed_channels_last",
    "many_experts_routed_channels_last",
    "crowd_channels_last",
    "off_vector_width_routed_contiguous",
    "skip_routed_contiguous_sliced_channels",
    "skip_without_norm_channels_last",
    "everything_channels_last",
    "nan_channels_last",
)


def sample_launches(sample: Sample):
    """The launches of one call of the public function, its tensors on ``meta``."""
    meta = sample.map_tensors(lambda tensor: tensor.to("meta")).kwargs
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(cond_conv2d).parameters.items()
        if parameter.default is not inspect.Parameter.empty and name != "backend"
    }
    padding = meta.get("padding", 0)
    padding = [padding] * 4 if isinstance(padding, int) else padding
    return triton_impl.launches(**defaults | meta | {"padding": padding})[1]


def names_of(launches) -> list[str]:
    return [launch.kernel.__name__ for launch in launches if launch.kernel.__name__ != "sum_splits"]


def arguments(launch) -> dict[str, Any]:
    return dict(zip(launch.kernel.arg_names, launch.args, strict=True))


def the(kernel: str, launches) -> dict[str, Any]:
    """The arguments of the one launch of a kernel."""
    (launch,) = (launch for launch in launches if launch.kernel.__name__ == kernel)
    return arguments(launch)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_interpreted(dtype, name):
    failure = interpreter.failures("cond_conv2d", dtype)[name]
    assert failure is None, failure


def interpret(program: str, *args: str) -> str:
    """What ``program`` prints that has small tiles, in a process where Triton's kernels are interpreted."""
    small = f"""
        from fastsd_kernels.cond_conv2d import triton_impl
        from fastsd_kernels.conv2d import triton_impl as conv2d_impl

        vars(conv2d_impl).update({SMALL_TILES})
        vars(triton_impl).update({SMALL_STEPS})
    """
    child = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(small) + "\n" + inspect.cleandoc(program), *args],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


@functools.cache
def small_tile_failures() -> dict[str, str | None]:
    program = "from tests.proving import interpreter; interpreter._main()"
    return json.loads(interpret(program, "cond_conv2d", "float32", "--twice", "--samples", *SMALL_TILE_SAMPLES))


@pytest.mark.parametrize("name", SMALL_TILE_SAMPLES)
def test_interpreted_in_small_tiles(name):
    assert small_tile_failures()[name] is None, small_tile_failures()[name]


def test_small_tiles_take_the_paths_of_large_maps(monkeypatch):
    for module, constants in ((conv2d_impl, SMALL_TILES), (triton_impl, SMALL_STEPS)):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(conv2d_impl, "plan", conv2d_impl.plan.__wrapped__)
    paths = set()
    for name in SMALL_TILE_SAMPLES:
        for launch in sample_launches(named(cases.samples("cpu", torch.float32), name)):
            kernel, a = launch.kernel.__name__, arguments(launch)
            if kernel == "activate":
                ragged = a["positions"] % a["BLOCK_S"] > 0 and a["skip_channels"] % a["BLOCK_C"] > 0
                paths.add((kernel, a["row_tiles"] > 1, a["x_tiles"] > 1, a["column_tiles"] - a["x_tiles"] > 1, ragged))
            if kernel == "route" and a["sums_ptr"] is not None:
                several = a["channels"] > a["BLOCK_C"], a["row_tiles"] > a["BLOCK_T"], a["out_channels"] > a["BLOCK_K"]
                paths.add((kernel, *several))
            if kernel == "mix":
                some = 1 < a["samples_per_program"] < a["samples"]
                paths.add((kernel, a["blocks"] > 1, some, a["EXPERTS"] > a["BLOCK_E"]))
            if kernel == "convolve" and a["weight_stride"] is not None:
                ways = a["alpha_ptr"] is not None, a["CONCAT"], a["splits"] > 1, a["skip_ptr"] is not None
                paths.add((kernel, *ways))
    assert paths >= {
        ("activate", True, True, True, False),
        ("activate", True, True, False, True),
        ("route", True, True, True),
        ("mix", True, False, True),
        ("mix", True, True, True),
        ("mix", True, True, False),
        *(("convolve", *way, True, skip) for way in ((False, False), (True, False), (True, True)) for skip in (0, 1)),
    }


def test_the_mean_is_that_of_the_rounded_map():
    """A logit that is 0 for the mean of what is convolved, and far from it for that of what was not rounded yet."""
    interpret("""
        import torch
        from fastsd_kernels import cond_conv2d

        torch.use_deterministic_algorithms(True)
        x, bias = torch.full((1, 2, 4, 8), 3.0).half(), torch.tensor([0.3, 0.3]).half()
        u = torch.nn.functional.silu(bias.float())
        assert (u.half() != u).all()
        routing = {"routing_weight": torch.tensor([[2.0**20, 0.0]]), "routing_bias": -(2.0**20) * u[:1].half().float()}
        norm = {"num_groups": 1, "norm_bias": bias, "activation": "silu"}
        one = torch.eye(2).half()[None, ..., None, None]
        for strategy in ("mix_first", "mix_in_loop", "concat"):
            y = cond_conv2d(x, one, **routing, **norm, strategy=strategy, backend="triton")
            assert torch.equal(y, (u.half() / 2)[None, :, None, None].expand_as(y)), strategy
    """)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_routing_takes_one_pass_over_the_map(strategy):
    launches = triton_launches("float16", 320, 64, strategy, True)
    mix = ["mix"] if strategy == "mix_first" else []
    assert names_of(launches) == ["group_statistics", "norm_coefficients", "activate", "route", *mix, "convolve"]
    activate, route, convolve = (the(kernel, launches) for kernel in ("activate", "route", "convolve"))
    assert activate["sums_ptr"] is route["sums_ptr"]
    assert activate["u_ptr"] is convolve["x_ptr"]
    assert convolve["coefficients_ptr"] is None
    assert not convolve["SILU"]
    assert route["rows_ptr"] is convolve["channel_bias_ptr"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_routing_the_norm_stays_in_the_convolution(strategy):
    launches = triton_launches("float16", 320, 64, strategy, False)
    mix = ["mix"] if strategy == "mix_first" else []
    assert names_of(launches) == ["group_statistics", "norm_coefficients", "route", *mix, "convolve"]
    convolve = the("convolve", launches)
    assert convolve["coefficients_ptr"] is the("norm_coefficients", launches)["coefficients_ptr"]
    assert convolve["SILU"]


def test_what_is_not_needed_is_left_out():
    given = named(cases.samples("cpu", torch.float32), "one_hot_contiguous").kwargs
    alone = {"num_groups": 0, "norm_weight": None, "norm_bias": None, "activation": "none", "strategy": "mix_first"}
    # one alpha for all samples: one mixture, and a plain convolution
    launches = sample_launches(Sample("shared", given | alone))
    assert names_of(launches) == ["mix", "convolve"]
    assert the("mix", launches)["samples"] == 1
    assert the("convolve", launches)["weight_stride"] is None
    assert names_of(sample_launches(Sample("shared", given | alone | {"strategy": "concat"}))) == ["convolve"]
    # what is convolved is there: it is summed up, and not written
    routing = {"alpha": None, "routing_weight": torch.ones(3, 16)}
    launches = sample_launches(Sample("bare", given | alone | routing))
    assert names_of(launches) == ["activate", "route", "mix", "convolve"]
    assert the("activate", launches)["u_ptr"] is None


@pytest.mark.parametrize(
    ("channels", "side", "strategy"),
    [(320, 64, "mix_first"), (640, 32, "mix_first"), (1280, 16, "mix_in_loop"), (1280, 8, "concat")],
)
def test_default_strategy(channels, side, strategy):
    """Stable Diffusion 1.5 at 512², three experts."""
    weights = 9 * channels * channels
    for batch in (1, 2):
        assert triton_impl.chosen(batch, batch, 3, weights, side * side, 2) == strategy
    assert triton_impl.chosen(2, 2, triton_impl.MOST_EXPERTS + 1, weights, side * side, 2) == "mix_first"
    launches = triton_launches("float16", channels, side, None, True)
    assert ("mix" in names_of(launches)) == (strategy == "mix_first")
    assert the("convolve", launches)["CONCAT"] == (strategy == "concat")


def test_experts_with_channels_innermost_are_not_copied():
    rows = torch.empty(3, 8, 3, 3, 16)
    for strategy, kernel, argument in (("mix_first", "mix", "experts_ptr"), ("concat", "convolve", "weight_ptr")):
        given = {"x": torch.empty(2, 16, 6, 5), "experts": rows.movedim(-1, 2), "alpha": torch.ones(1, 3), "padding": 1}
        bound = inspect.signature(cond_conv2d).bind(**given, strategy=strategy)
        bound.apply_defaults()
        bound.arguments.pop("backend")
        launches = triton_impl.launches(**bound.arguments | {"padding": [1] * 4})[1]
        assert the(kernel, launches)[argument].data_ptr() == rows.data_ptr()


def test_large_batches_stay_on_the_one_long_grid_axis():
    for sample in cases.large_samples("meta", torch.float16):
        for strategy in STRATEGIES:
            for launch in sample_launches(Sample(sample.name, sample.kwargs | {"strategy": strategy})):
                (programs,) = launch.grid
                assert 1 <= programs < 2**31


def test_ahead_of_time_specialisation_is_tritons_own():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    for strategy in STRATEGIES:
        given = named(cases.samples("cpu", torch.float16), "everything_contiguous").kwargs
        for launch in sample_launches(Sample(strategy, given | {"strategy": strategy})):
            ours = triton_aot.specialise(launch.kernel, launch.args)
            bind = create_function_from_signature(
                launch.kernel.signature, launch.kernel.params, make_backend(GPUTarget("cuda", 80, 32))
            )
            _, theirs, _ = bind(*launch.args)
            assert list(ours.signature.values()) == [kind for kind, _ in theirs]


@pytest.mark.parametrize(
    ("x", "given", "words"),
    [
        (torch.float64, {}, ("x", "float16, bfloat16 or float32", "torch.float64", "backend='reference'")),
        (torch.float16, {"alpha": torch.float8_e5m2}, ("alpha", "torch.float8_e5m2", "cast")),
        (torch.float16, {"routing_weight": torch.float8_e5m2}, ("routing_weight", "torch.float8_e5m2", "cast")),
        (torch.float16, {"expert_biases": torch.float8_e5m2}, ("expert_biases", "torch.float8_e5m2", "cast")),
        (torch.float16, {}, ("GPU", "cpu", "backend='cpu'")),
    ],
    ids=("float64", "float8_alpha", "float8_routing", "float8_biases", "on_the_cpu"),
)
def test_refusals(x, given, words):
    assert_refused(words, x, **{name: torch.ones(4).to(dtype) for name, dtype in given.items()})


@pytest.mark.parametrize("strategy", ["mix_in_loop", "concat"])
def test_too_many_experts_are_refused(strategy):
    words = ("up to 8 experts", repr(strategy), "got 9", "strategy='mix_first'")
    assert_refused(words, torch.float16, experts=torch.ones(9, 4, 4, 3, 3), strategy=strategy)


def assert_refused(words, dtype, **given):
    names = list(inspect.signature(triton_impl.reject).parameters)
    some = {"x": torch.ones(1, 4, 3, 3, dtype=dtype), "experts": torch.ones(2, 4, 4, 3, 3)}
    sentence = triton_impl.reject(**dict.fromkeys(names) | some | given)
    for word in words:
        assert word in sentence


def test_interpreter_refuses_bfloat16():
    failure = interpreter.failures("cond_conv2d", "bfloat16", names=("plain_contiguous",))["plain_contiguous"]
    for words in ("BackendUnavailable", "bfloat16", "TRITON_INTERPRET"):
        assert words in failure


def test_forced_on_the_cpu():
    with pytest.raises(BackendUnavailable, match=r"'triton' cannot be used: .*GPU.*backend='cpu'"):
        cond_conv2d(torch.ones(1, 4, 3, 3), torch.ones(2, 4, 4, 3, 3), alpha=torch.ones(1, 2), backend="triton")


def test_missing_triton_is_a_refusal():
    program = """
        import sys
        sys.modules["triton"] = None
        import torch
        from fastsd_kernels.cond_conv2d import op
        print(op.backends["triton"].reject(torch.ones(1, 4, 2, 2)))
    """
    child = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(program)], capture_output=True, text=True, check=True
    )
    assert "pip install triton" in child.stdout


def device_samples(dtype: torch.dtype):
    """The samples of the contract, and convolutions of U-Nets in every strategy."""
    like = {"device": "cuda", "dtype": dtype}
    yield from cases.samples("cuda", dtype)
    yield from cases.large_samples("cuda", dtype)
    for layout in ("contiguous", "channels_last"):
        for channels, side in ((320, 64), (640, 32), (1280, 16), (1280, 8)):
            for strategy in (None, *STRATEGIES):
                given = {
                    "x": feature_map((2, channels, side, side), layout, **like),
                    "experts": random_tensor((3, channels, channels, 3, 3), **like) * (9 * channels) ** -0.5,
                    "expert_biases": random_tensor((3, channels), **like),
                    "routing_weight": random_tensor((3, channels), **like) * channels**-0.5,
                    "padding": 1,
                    "num_groups": 32,
                    "activation": "silu",
                    "channel_bias": random_tensor((2, channels), **like),
                    "strategy": strategy,
                }
                yield Sample(f"{channels}_{side}_{layout}_{strategy}", given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_device(dtype):
    for sample in device_samples(dtype):
        try:
            check_op(op, sample, "triton")
            first, second = (cond_conv2d(**sample.kwargs, backend="triton") for _ in range(2))
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
        except Exception as error:
            raise AssertionError(f"{sample}: {error}") from error
