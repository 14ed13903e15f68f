"""What is particular to linear's CPU backend: sizes of models, many and few rows, threads, edges of what is packed."""

import pytest
import torch

from fastsd_kernels import linear
from fastsd_kernels.linear import op
from fastsd_kernels.testing import Sample, check_op
from fastsd_kernels.testing.inputs import random_tensor

# rows, channels, features: on both sides of 512 rows, weights above 12 MB, depths above what a panel holds at once
SIZES = {
    "many_rows": (1030, 320, 640),
    "rows_of_one_task_more": (625, 96, 70),
    "few_rows": (511, 96, 70),
    "weights_in_two_parts": (520, 1280, 2600),
    "deep": (520, 2600, 66),
    "deep_few_rows": (40, 5200, 66),
    "one_feature": (600, 40, 2),
}


def sample(name, dtype, activation="geglu"):
    rows, channels, features = SIZES[name]
    like = {"device": "cpu", "dtype": dtype}
    width = features // 2 if activation == "geglu" else features
    return Sample(
        name,
        {
            "x": random_tensor((rows, channels), **like) + 0.5,
            "weight": random_tensor((features, channels), **like, seed=5) * channels**-0.5,
            "bias": random_tensor((features,), **like, seed=6),
            "norm_weight": random_tensor((channels,), **like, seed=1),
            "norm_bias": random_tensor((channels,), **like, seed=2),
            "norm_eps": 1e-5,
            "activation": activation,
            "residual": random_tensor((rows, width), **like, seed=8),
        },
    )


@pytest.mark.parametrize("activation", ["none", "geglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name, dtype, activation):
    check_op(op, sample(name, dtype, activation), "cpu")


@pytest.mark.parametrize("name", ["many_rows", "few_rows", "deep"])
def test_any_number_of_threads_gives_the_same_bits(name):
    given = sample(name, torch.float32).kwargs
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(linear(**given, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_infinities_into_gelu(activation):
    """As in float64; torch's own float32 kernel makes NaN of inf."""
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, -1e30]).repeat(8)[:, None]
    y = linear(x, torch.ones(1, 1), activation=activation, backend="cpu")[:4, 0]
    assert y[0] == torch.inf
    assert y[1:3].isnan().all()
    assert y[3] == 0


def test_tensors_that_are_not_the_ops_are_refused():
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    call = torch.ops.fastsd_cpu.linear.default
    with pytest.raises(ValueError, match="twice as many rows"):
        call(x, weight, None, None, None, None, "geglu", None, 0, torch.empty(4, 6))
    with pytest.raises(ValueError, match="a row for each"):
        call(x, weight, None, None, None, None, "none", None, 0, torch.empty(3, 6))
    with pytest.raises(ValueError, match="got 'relu'"):
        call(x, weight, None, None, None, None, "relu", None, 0, torch.empty(4, 6))
