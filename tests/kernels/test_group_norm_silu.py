"""group_norm_silu on the backends that run on the host, against its reference."""

import pytest
import torch
from torch.library import opcheck

from fastsd_kernels import group_norm_silu
from fastsd_kernels.group_norm_silu import cases, op
from fastsd_kernels.testing import check_op, named

SAMPLES = [sample.name for sample in cases.samples("cpu", torch.float32)]
# opcheck compares with ==, which NaN never passes
FINITE_SAMPLES = [name for name in SAMPLES if not name.startswith(("nan", "inf"))]
# finite differences of steps of 1e-6 around 30 000 drown in the reference's rounding
SMOOTH_SAMPLES = [name for name in FINITE_SAMPLES if not name.startswith("large_mean")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(dtype, name):
    check_op(op, named(cases.samples("cpu", dtype), name), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_batch(dtype):
    for sample in cases.large_samples("cpu", dtype):
        check_op(op, sample, "cpu")


@pytest.mark.parametrize("sample", list(cases.bad_samples("cpu")), ids=str)
def test_bad_input(sample):
    with pytest.raises(sample.error) as caught:
        group_norm_silu(**sample.kwargs)
    for words in sample.says:
        assert words in str(caught.value)


@pytest.mark.parametrize("name", FINITE_SAMPLES)
def test_opcheck(name):
    opcheck(torch.ops.fastsd.group_norm_silu, (), named(cases.samples("cpu", torch.float32), name).kwargs)


@pytest.mark.parametrize("name", SMOOTH_SAMPLES)
def test_gradients(name):
    sample = named(cases.samples("cpu", torch.float64), name).map_tensors(torch.Tensor.double).requiring_grad()
    tensors = {key: value for key, value in sample.kwargs.items() if isinstance(value, torch.Tensor)}
    others = {key: value for key, value in sample.kwargs.items() if key not in tensors}
    torch.autograd.gradcheck(
        lambda *values: group_norm_silu(**dict(zip(tensors, values, strict=True)), **others),
        tuple(tensors.values()),
        fast_mode=True,
    )


def test_forward_mode_is_refused():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            group_norm_silu(x, 2)
        group_norm_silu(torch.randn(1, 4, 2, 2), 2)


def test_second_gradients():
    like = {"dtype": torch.float64, "requires_grad": True}
    x, skip = torch.randn(2, 4, 3, 2, **like), torch.randn(2, 4, 3, 2, **like)
    weight, bias, channel_bias = torch.randn(8, **like), torch.randn(8, **like), torch.randn(2, 8, **like)
    torch.autograd.gradgradcheck(
        lambda x, w, b, c, s: group_norm_silu(x, 4, w, b, 1e-3, channel_bias=c, skip=s),
        (x, weight, bias, channel_bias, skip),
    )
