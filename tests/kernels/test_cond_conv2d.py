"""cond_conv2d on the backends that run on the host, against its reference, and the oracles of its definition."""

import pytest
import torch
import torch.nn.functional as F

from fastsd_kernels import cond_conv2d
from fastsd_kernels.cond_conv2d import op
from tests.proving.op_suite import OpSuite

DOUBLE = {"dtype": torch.float64}


class TestCondConv2d(OpSuite):
    op = op


@pytest.fixture
def case():
    torch.manual_seed(0)
    return torch.randn(2, 6, 7, 5, **DOUBLE), torch.randn(3, 4, 6, 3, 3, **DOUBLE), torch.randn(3, 4, **DOUBLE)


def test_one_hot_is_a_plain_convolution(case):
    x, experts, biases = case
    y = cond_conv2d(x, experts, biases, torch.eye(3, **DOUBLE)[[1, 2]], padding=1, backend="reference")
    for sample, expert in enumerate((1, 2)):
        plain = F.conv2d(x[sample : sample + 1], experts[expert], biases[expert], padding=1)
        torch.testing.assert_close(y[sample : sample + 1], plain)


def test_mixing_kernels_is_mixing_results(case):
    x, experts, biases = case
    alpha = torch.randn(2, 3, **DOUBLE)
    y = cond_conv2d(x, experts, biases, alpha, padding=1, backend="reference")
    each = torch.stack([F.conv2d(x, w, b, padding=1) for w, b in zip(experts, biases, strict=True)])
    torch.testing.assert_close(y, torch.einsum("be,ebkhw->bkhw", alpha, each))


@pytest.mark.parametrize(("routing", "act"), [("sigmoid", torch.sigmoid), ("softmax", lambda z: z.softmax(1))])
def test_routing_reads_the_mean_of_what_is_convolved(case, routing, act):
    x, experts, _ = case
    weight, bias, offset = torch.randn(3, 6, **DOUBLE), torch.randn(3, **DOUBLE), torch.randn(1, 3, **DOUBLE)
    given = {"padding": 1, "num_groups": 3, "activation": "silu", "backend": "reference"}
    u = F.silu(F.group_norm(x, 3))
    alpha = offset + act(u.mean((2, 3)) @ weight.T + bias)
    routed = cond_conv2d(x, experts, alpha=offset, routing_weight=weight, routing_bias=bias, routing=routing, **given)
    torch.testing.assert_close(routed, cond_conv2d(x, experts, alpha=alpha, **given))


def test_second_gradients(case):
    x, experts, _ = case
    x, experts = x[:, :, :3, :2].clone().requires_grad_(), experts.clone().requires_grad_()
    weight = torch.randn(3, 6, **DOUBLE, requires_grad=True)
    torch.autograd.gradgradcheck(
        lambda x, w, r: cond_conv2d(x, w, routing_weight=r, padding=1, num_groups=3, eps=1e-3, activation="silu"),
        (x, experts, weight),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_the_dtype_in_force(dtype):
    x, experts, alpha = torch.randn(1, 8, 5, 5), torch.randn(2, 8, 8, 3, 3), torch.ones(1, 2)
    with torch.autocast("cpu", dtype):
        assert cond_conv2d(x, experts, alpha=alpha, padding=1).dtype == dtype
    assert cond_conv2d(x, experts, alpha=alpha, padding=1).dtype == torch.float32
