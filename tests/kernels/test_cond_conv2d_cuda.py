"""cond_conv2d's CUDA kernels: on the host, thread by thread, and on a card."""

import functools
import inspect
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastsd_kernels import cond_conv2d
from fastsd_kernels.cond_conv2d import cases, cuda_impl, op
from fastsd_kernels.layout import is_channels_last, is_dense
from fastsd_kernels.testing import Sample, assert_contract, check_op, named
from tests.harness import host

DTYPES = (torch.float16, torch.bfloat16)
ALL = list(cases.samples("cpu", torch.float32))
SAMPLES = [sample.name for sample in ALL if sample.kwargs.get("strategy") in (None, "mix_first")]
REFUSED = [sample.name for sample in ALL if sample.name not in SAMPLES]
# Elements of one size are accessed alike; each variant of the source costs the compiler time
IN_BFLOAT16 = (
    "everything_contiguous",
    "everything_channels_last",
    "skip_routed_contiguous_sliced_channels",
    "large_mean_channels_last",
    "nan_channels_last",
)
ON_THE_HOST = [*((torch.float16, name) for name in SAMPLES), *((torch.bfloat16, name) for name in IN_BFLOAT16)]
# On a small card a block has several samples and a long chunk of positions
ON_A_SMALL_CARD = (
    "many_samples_routed_channels_last",
    "many_experts_routed_contiguous",
    "many_tiles_routed_channels_last",
    "off_vector_width_routed_contiguous",
    "mix_first_9x22_channels_last_routed",
    "crowd_contiguous",
)
SANITIZED_SAMPLES = (
    "everything_contiguous",
    "off_vector_width_routed_channels_last",
    "one_channel_routed_contiguous",
    "mix_first_6x5_channels_last",
    "skip_routed_channels_last_sliced_channels",
)
MULTIPROCESSORS = 132

SANITIZED = """
from tests.kernels import test_cond_conv2d_cuda as tests
wanted = [*map(tests.sample_of, tests.SANITIZED_SAMPLES)]
small = [*map(tests.sample_of, tests.ON_A_SMALL_CARD)]
tests.build_for(wanted)
tests.build_for(small, 1)
for sample in wanted:
    tests.assert_right(sample)
for sample in small:
    tests.assert_right(sample, 1)
print("right:", len(wanted) + len(small))
"""

# One number less than the kernel, named by the argument, needs
PLANTED = """
import sys
from tests.kernels import test_cond_conv2d_cuda as tests
def launch(source, kernel, defines, *, args, **rest):
    if kernel == sys.argv[1]:
        at = tests.OUTPUTS[kernel]
        args[at] = args[at].flatten()[:-1].clone()
    tests.host.launch(source, kernel, defines, args=args, **rest)
tests.compute(tests.sample_of("everything_contiguous"), launch)
"""
OUTPUTS = {"cond_conv2d_activate": 4, "cond_conv2d_route": 7, "cond_conv2d_mix": 2}

WITHOUT_CUDA = """
import sys
sys.modules["cuda"] = sys.modules["cuda.core"] = None
import torch
from fastsd_kernels.cond_conv2d import cuda_impl
print(cuda_impl.reject(torch.zeros(1, 4, 2, 2), torch.zeros(2, 4, 4, 1, 1), *[None] * 17))
"""


@pytest.fixture(scope="module")
def libraries():
    """All variants that the samples need, compiled side by side."""
    build_for([sample_of(name, dtype) for dtype, name in ON_THE_HOST])
    build_for(map(sample_of, ON_A_SMALL_CARD), 1)


def sample_of(name, dtype=torch.float16):
    return named(cases.samples("cpu", dtype), name)


def changed(sample, **changes):
    return Sample("changed", sample.kwargs | changes)


def build_for(samples, multiprocessors=MULTIPROCESSORS):
    host.build(
        {
            (launch["source"], launch["defines"]): None
            for sample in samples
            for launch in launches_of(sample, multiprocessors)
        }
    )


def launches_of(sample, multiprocessors=MULTIPROCESSORS):
    noted = []

    def note(source, kernel, defines, **launch):
        noted.append({"source": source, "kernel": kernel, "defines": defines, **launch})

    compute(sample, note, multiprocessors)
    return noted


def names_of(sample):
    return [launch["kernel"] for launch in launches_of(sample) if launch["kernel"] != "conv2d_reduce"]


def arguments(sample):
    bound = inspect.signature(cond_conv2d).bind(**sample.kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    del given["backend"]
    if isinstance(given["padding"], int):
        given["padding"] = [given["padding"]] * 4
    return list(given.values())


def compute(sample, launch=host.launch, multiprocessors=MULTIPROCESSORS):
    return cuda_impl.compute(launch, multiprocessors, *arguments(sample)[:-1])


def assert_right(sample, multiprocessors=MULTIPROCESSORS):
    """Within the contract, dense in x's layout, and the same bits in the opposite order of threads."""
    actual = compute(sample, host.launch, multiprocessors)
    assert is_dense(actual, is_channels_last(sample.kwargs["x"]))
    plain = cond_conv2d(**sample.kwargs, backend="reference")
    exact = cond_conv2d(**sample.map_tensors(Tensor.double).kwargs, backend="reference")
    assert_contract(actual, exact, plain)
    again = compute(sample, functools.partial(host.launch, seed=1), multiprocessors)
    torch.testing.assert_close(again, actual, rtol=0, atol=0, equal_nan=True)


def plan(**changes):
    """The plan of 320 channels on 64 × 64 positions with three experts."""
    return cuda_impl.plan(
        **{
            "batch": 2,
            "x_channels": 320,
            "skip_channels": 0,
            "space": 64 * 64,
            "count": 3,
            "weights": 9 * 320 * 320,
            "mixtures": 2,
            "rows": 2,
            "dtype": torch.float16,
            "parameter_dtype": torch.float16,
            "alignment": 16,
            "expert_alignment": 16,
            "multiprocessors": MULTIPROCESSORS,
        }
        | changes
    )


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(("dtype", "name"), ON_THE_HOST, ids=str)
def test_contract(dtype, name):
    assert_right(sample_of(name, dtype))


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", ON_A_SMALL_CARD)
def test_contract_on_a_small_card(name):
    assert_right(sample_of(name), multiprocessors=1)


def test_small_cards_take_the_paths_of_large_batches():
    paths = set()
    for name in ON_A_SMALL_CARD:
        for launch in launches_of(sample_of(name), 1):
            if launch["kernel"] == "cond_conv2d_activate":
                *_, space, chunk, chunks, _ = launch["args"]
                paths.add((launch["kernel"], chunk > 32, chunks > 1 and space % chunk > 0))
            if launch["kernel"] == "cond_conv2d_mix":
                *_, count, of_block = launch["args"]
                held = int(launch["defines"][-1].removeprefix("HELD="))
                paths.add((launch["kernel"], of_block > 1, count > held))
    assert ("cond_conv2d_activate", True, True) in paths
    assert {("cond_conv2d_mix", True, True), ("cond_conv2d_mix", True, False)} <= paths


def test_weights_of_each_sample_are_split_too():
    launches = launches_of(sample_of("mix_first_6x5_channels_last"))
    (convolve,) = (launch for launch in launches if launch["kernel"] == "conv2d_implicit_gemm")
    _, skip, weight, *_, workspace = convolve["args"][:9]
    assert skip is not None
    assert weight.shape == (2, 40, 9, 32)
    assert workspace.shape[0] == 2


@pytest.mark.usefixtures("libraries")
def test_the_mean_is_that_of_the_rounded_map():
    """A logit that is 0 for the mean of what is convolved, and far from it for that of what was not rounded yet."""
    x, bias = torch.full((1, 8, 4, 8), 3.0).half(), torch.full((8,), 0.3).half()
    u = torch.nn.functional.silu(bias.float())
    assert (u.half() != u).all()
    weight = torch.zeros(1, 8)
    weight[0, 0] = 2.0**20
    given = {"x": x, "experts": torch.eye(8).half()[None, ..., None, None]}
    given |= {"routing_weight": weight, "routing_bias": -(2.0**20) * u[:1].half().float()}
    given |= {"num_groups": 1, "norm_bias": bias, "activation": "silu"}
    y = compute(Sample("rounded", given))
    assert torch.equal(y, (u.half() / 2)[None, :, None, None].expand_as(y))


ROUTED = ["cond_conv2d_activate", "cond_conv2d_route", "cond_conv2d_mix", "conv2d_implicit_gemm"]
NORM = ["group_norm_silu_stats", "conv2d_coefficients"]


def test_routing_takes_one_pass_over_the_map():
    assert names_of(sample_of("everything_contiguous")) == [*NORM, *ROUTED]
    launches = {launch["kernel"]: launch["args"] for launch in launches_of(sample_of("everything_contiguous"))}
    u = launches["cond_conv2d_activate"][3]
    assert launches["conv2d_implicit_gemm"][0].data_ptr() == u.data_ptr()
    # neither coefficients nor an activation are left for the convolution
    assert launches["conv2d_implicit_gemm"][3] is None
    assert launches["conv2d_implicit_gemm"][-4] == 0


def test_without_routing_the_norm_stays_in_the_convolution():
    # whose variant merges the statistics, after the weights are there
    assert names_of(sample_of("mix_first_8x8_contiguous")) == [*ROUTED[1:3], *NORM, *ROUTED[3:]]


def test_what_is_not_needed_is_left_out():
    bare = sample_of("vector_width_routed_contiguous")
    assert names_of(bare) == ROUTED
    (activate,) = (launch for launch in launches_of(bare) if launch["kernel"] == "cond_conv2d_activate")
    assert activate["args"][3] is None
    # one alpha for all samples: one mixture, and a plain convolution
    alone = launches_of(sample_of("one_hot_contiguous"))
    (mix,) = (launch["args"] for launch in alone if launch["kernel"] == "cond_conv2d_mix")
    (convolve,) = (launch["args"] for launch in alone if launch["kernel"] == "conv2d_implicit_gemm")
    assert mix[2].shape[0] == 1
    assert convolve[2].dim() == 3


@pytest.mark.usefixtures("libraries")
def test_biases_of_samples_that_share_their_kernel():
    """One mixture, but rows of what is added for each sample."""
    shared = sample_of("everything_contiguous")
    assert shared.kwargs["alpha"].shape[0] == 1
    assert shared.kwargs["channel_bias"].shape[0] == 2
    sample = changed(shared, routing_weight=None, routing_bias=None)
    build_for([sample])
    assert_right(sample)


def test_experts_with_channels_innermost_are_not_copied():
    rows = torch.zeros(3, 8, 3, 3, 16).half()
    given = {"x": torch.zeros(2, 16, 6, 5).half(), "experts": rows.movedim(-1, 2), "alpha": torch.ones(1, 3)}
    (mix,) = (launch["args"] for launch in launches_of(Sample("", given)) if launch["kernel"] == "cond_conv2d_mix")
    assert mix[0].data_ptr() == rows.data_ptr()


def test_sanitized():
    """No access outside a tensor or outside shared memory, no misaligned one and no undefined arithmetic."""
    done = host.run_sanitized(SANITIZED)
    assert done.returncode == 0, done.stderr
    assert f"right: {len(SANITIZED_SAMPLES) + len(ON_A_SMALL_CARD)}" in done.stdout


@pytest.mark.parametrize("kernel", OUTPUTS)
def test_sanitizer_catches_tensors_of_a_wrong_size(kernel):
    done = host.run_sanitized(PLANTED, kernel)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert kernel in done.stderr


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("channels", "side"), [(320, 64), (640, 32), (1280, 16), (1280, 8)])
def test_plan_fills_the_card_with_16_byte_accesses(channels, side, batch):
    """Stable Diffusion 1.5 at 512²."""
    of = {"x_channels": channels, "space": side * side, "weights": 9 * channels**2}
    p = plan(batch=batch, mixtures=batch, rows=batch, **of)
    assert {"VECTOR=8", "MIX_VECTOR=8", "HELD=3"} <= set(p.defines)
    assert p.activate.grid[0] >= 40
    assert p.mix.grid[0] >= MULTIPROCESSORS
    # the experts are read once
    assert p.samples_per_block == batch


@pytest.mark.parametrize(
    ("changes", "defines"),
    [
        ({"alignment": 8}, ("VECTOR=4", "MIX_VECTOR=8")),
        ({"expert_alignment": 2}, ("VECTOR=8", "MIX_VECTOR=1")),
        ({"x_channels": 316, "skip_channels": 4}, ("VECTOR=4",)),
        ({"x_channels": 319}, ("VECTOR=1",)),
        ({"weights": 4}, ("MIX_VECTOR=4",)),
        ({"count": 100}, ("HELD=8",)),
    ],
    ids=str,
)
def test_plan_narrows_accesses_where_rows_are_not_aligned(changes, defines):
    assert set(defines) <= set(plan(**changes).defines)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 65537, "space": 4, "mixtures": 65537, "rows": 65537},
        {"batch": 1, "space": 2**30, "mixtures": 1, "rows": 1},
        {"batch": 1, "x_channels": 1, "space": 1, "weights": 1, "mixtures": 1, "rows": 1},
        {"x_channels": 2**20, "weights": 2**35},
        {"multiprocessors": 1},
        {"multiprocessors": 10**5},
    ],
    ids=str,
)
def test_plan_stays_within_the_limits_of_a_launch(changes):
    p = plan(**changes)
    for launch in (p.activate, p.route, p.mix):
        assert 0 < launch.grid[0] < 2**31
        assert launch.grid[1:] == (1, 1)
        assert launch.block == (256, 1, 1)
        assert launch.shared_bytes <= 8 * 1024


@pytest.mark.parametrize("name", REFUSED)
def test_other_strategies_are_refused(name):
    sample = sample_of(name)
    with FakeTensorMode():
        elsewhere = sample.map_tensors(lambda t: torch.empty(t.shape, device="cuda", dtype=torch.float16))
        refusal = cuda_impl.reject(*arguments(elsewhere))
    strategy = sample.kwargs["strategy"]
    assert refusal == f"strategy is {strategy!r}; the cuda backend has 'mix_first'; use backend='triton'"


def test_rejections():
    def reject(device="cuda", dtype=torch.float16, batch=2, **changes):
        given = {"x": torch.empty(batch, 8, 4, 4, device=device, dtype=dtype)}
        given |= {"experts": torch.empty(2, 8, 8, 3, 3, device=device, dtype=dtype), "padding": 1}
        return cuda_impl.reject(*arguments(Sample("refused", given | changes)))

    assert reject("cpu") == "x is on cpu; the cuda backend needs CUDA tensors"
    with FakeTensorMode():
        for dtype in DTYPES:
            for strategy in (None, "mix_first"):
                assert reject(dtype=dtype, strategy=strategy) is None
        for dtype in (torch.float32, torch.float64):
            assert reject(dtype=dtype).startswith(f"x is {dtype}; the cuda backend takes float16 and bfloat16")
        assert reject(batch=0) is None
        assert "x has 536870912 samples" in reject(batch=2**29)


def test_module_needs_no_cuda_package():
    done = subprocess.run([sys.executable, "-c", WITHOUT_CUDA], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "x is on cpu; the cuda backend needs CUDA tensors"


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_on_a_card(dtype, name):
    sample = named(cases.samples("cuda", dtype), name)
    check_op(op, sample, "cuda")
    first, second = (cond_conv2d(**sample.kwargs, backend="cuda") for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_batch_on_a_card(dtype):
    for sample in cases.large_samples("cuda", dtype):
        check_op(op, sample, "cuda")
