"""conv2d on the backends that run on the host, against its reference."""

import pytest
import torch

from fastsd_kernels import conv2d
from fastsd_kernels.conv2d import op
from tests.proving.op_suite import OpSuite


class TestConv2d(OpSuite):
    op = op


def test_second_gradients():
    like = {"dtype": torch.float64, "requires_grad": True}
    x, skip, weight = torch.randn(1, 4, 3, 2, **like), torch.randn(1, 2, 3, 2, **like), torch.randn(3, 6, 3, 3, **like)
    norm, residual = torch.randn(6, **like), torch.randn(1, 3, 3, 2, **like)
    torch.autograd.gradgradcheck(
        lambda x, s, w, n, r: conv2d(
            x, w, padding=1, skip=s, num_groups=3, norm_weight=n, eps=1e-3, activation="silu", residual=r
        ),
        (x, skip, weight, norm, residual),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_the_dtype_in_force(dtype):
    x, weight = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3)
    with torch.autocast("cpu", dtype):
        assert conv2d(x, weight, padding=1).dtype == dtype
    assert conv2d(x, weight, padding=1).dtype == torch.float32
