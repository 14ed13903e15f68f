"""attention on the backends that run on the host, against its reference; and the reference against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from fastsd_kernels import attention
from fastsd_kernels.attention import cases, op
from fastsd_kernels.testing import named
from tests.proving.op_suite import OpSuite


class TestAttention(OpSuite):
    op = op


@pytest.mark.parametrize("name", ["width_40", "64_queries_77_keys", "65_queries_130_keys_biased", "own_scale"])
def test_reference_against_torch(name):
    given = named(cases.samples("cpu", torch.float64), name).kwargs
    q, k, v, bias = (given.get(key) for key in ("q", "k", "v", "bias"))
    mask = None if bias is None else bias[:, None, None].double()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=given.get("scale"))
    torch.testing.assert_close(attention(**given, backend="reference"), expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_bias():
    given = named(cases.samples("cpu", torch.float64), "shared_bias").kwargs
    bias = given["bias"].requires_grad_()
    attention(**given).square().sum().backward()
    step = torch.zeros_like(bias)
    step[0, 3] = 1e-6
    with torch.no_grad():
        values = [attention(**given | {"bias": bias + sign * step}).square().sum() for sign in (1, -1)]
    assert bias.grad[0, 3].item() == pytest.approx(((values[0] - values[1]) / 2e-6).item(), rel=1e-5)
