"""The numerical contract: how far an op may be from its reference, and how that is checked."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsd_kernels.testing.inputs import Sample

if TYPE_CHECKING:
    from fastsd_kernels.dispatch import Op

FLOOR_ULPS = 4


class ContractViolation(AssertionError):
    """A result outside the numerical contract; the message says by how much."""


def assert_contract(actual: Tensor, exact: Tensor, plain: Tensor, relative_l2: float | None = None) -> None:
    """FlashAttention's rule: the largest error of ``actual`` is at most twice that of plain PyTorch.

    Args:
        actual: what the op returned.
        exact: the reference evaluated in float64 on the same inputs.
        plain: the reference evaluated at the op's dtype.
        relative_l2: if given, what the relative L2 error may be instead.

    Twice the error of ``plain``, plus a floor of ``FLOOR_ULPS`` units in the last place of the largest exact
    value: plain PyTorch is sometimes right by luck. NaN must stand where plain PyTorch has NaN, and infinities
    where it has the same infinity.
    """
    if actual.shape != plain.shape or actual.dtype != plain.dtype:
        raise ContractViolation(
            f"expected {plain.dtype} {tuple(plain.shape)}; got {actual.dtype} {tuple(actual.shape)}"
        )
    finite = torch.isfinite(plain)
    if not torch.equal(torch.isfinite(actual), finite):
        raise ContractViolation(
            f"{int((torch.isfinite(actual) != finite).sum())} of {finite.numel()} elements differ from plain "
            "PyTorch in being finite"
        )
    if not torch.equal(actual[~finite].nan_to_num(nan=0.0), plain[~finite].nan_to_num(nan=0.0)):
        raise ContractViolation("NaN and infinities stand at other places than in plain PyTorch")
    if not finite.any():
        return
    exact = exact[finite]
    if relative_l2 is not None:
        relative = ((actual[finite].double() - exact).norm() / exact.norm()).item()
        if not relative <= relative_l2:
            raise ContractViolation(f"relative L2 error {relative:.3e} against float64, allowed {relative_l2:.3e}")
        return
    error = (actual[finite].double() - exact).abs().max().item()
    plain_error = (plain[finite].double() - exact).abs().max().item()
    floor = FLOOR_ULPS * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    if not error <= 2 * plain_error + floor:
        raise ContractViolation(
            f"error {error:.3e} against float64; plain PyTorch {plain_error:.3e}, allowed {2 * plain_error + floor:.3e}"
        )


def check_op(op: "Op", sample: Sample, backend: str | None) -> None:
    """Run one sample on one backend and hold it to the contract.

    Raises:
        ContractViolation: the result is outside the contract.
        BackendUnavailable: the backend refuses the sample.
    """
    check_result(op, sample, _function(op)(**sample.kwargs, backend=backend))


def check_result(op: "Op", sample: Sample, actual: Tensor) -> None:
    """Hold to the contract what a backend returned for a sample.

    Raises:
        ContractViolation: the result is outside the contract, or has other strides than the reference's.
    """
    plain = _function(op)(**sample.kwargs, backend="reference")
    exact = _function(op)(**sample.map_tensors(Tensor.double).kwargs, backend="reference")
    if actual.shape == plain.shape and _strides(actual) != _strides(plain):
        raise ContractViolation(f"expected strides {plain.stride()}; got {actual.stride()}")
    assert_contract(actual, exact, plain, sample.relative_l2)


def _function(op: "Op") -> Callable[..., Tensor]:
    return getattr(importlib.import_module("fastsd_kernels"), op.name)


def _strides(tensor: Tensor) -> list[int]:
    # that of a dimension of size 1 says nothing, and an empty tensor has none that do
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and tensor.numel()]
