"""linear on the backends that run on the host, against its reference; and the reference against modules."""

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import nn
from transformers.activations import QuickGELUActivation

from fastsd_kernels import linear
from fastsd_kernels.linear import op
from tests.proving.op_suite import OpSuite


class TestLinear(OpSuite):
    op = op


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_reference_is_the_modules_of_a_transformer(dtype):
    torch.manual_seed(0)
    norm, geglu, out = nn.LayerNorm(24).to(dtype), GEGLU(24, 40).to(dtype), nn.Linear(40, 24).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 9, 24, dtype=dtype)
    affine = {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}
    given = {**affine, "activation": "geglu", "backend": "reference"}
    y = linear(x, geglu.proj.weight, geglu.proj.bias, **given)
    assert torch.equal(y, geglu(norm(x)))
    z = linear(y, out.weight, out.bias, residual=x, backend="reference")
    assert torch.equal(z, out(y) + x)
    gelu = linear(x, geglu.proj.weight, geglu.proj.bias, activation="gelu", backend="reference")
    assert torch.equal(gelu, nn.functional.gelu(geglu.proj(x)))
    quick = linear(x, geglu.proj.weight, geglu.proj.bias, activation="quick_gelu", backend="reference")
    assert torch.equal(quick, QuickGELUActivation()(geglu.proj(x)))
