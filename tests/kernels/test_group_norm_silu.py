"""group_norm_silu on the backends that run on the host, against its reference."""

import pytest
import torch

from fastsd_kernels import group_norm_silu
from fastsd_kernels.group_norm_silu import op
from tests.proving.op_suite import OpSuite


class TestGroupNormSilu(OpSuite):
    op = op


def test_forward_mode_is_refused():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            group_norm_silu(x, 2)
        group_norm_silu(torch.randn(1, 4, 2, 2), 2)
    x = torch.randn(1, 4, 2, 2)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: group_norm_silu(x, 2), (x,), (x,))
    torch.func.jvp(lambda y: y * group_norm_silu(x, 2), (x,), (x,))


def test_second_gradients():
    like = {"dtype": torch.float64, "requires_grad": True}
    x, skip = torch.randn(2, 4, 3, 2, **like), torch.randn(2, 4, 3, 2, **like)
    weight, bias, channel_bias = torch.randn(8, **like), torch.randn(8, **like), torch.randn(2, 8, **like)
    torch.autograd.gradgradcheck(
        lambda x, w, b, c, s: group_norm_silu(x, 4, w, b, 1e-3, channel_bias=c, skip=s),
        (x, weight, bias, channel_bias, skip),
    )
