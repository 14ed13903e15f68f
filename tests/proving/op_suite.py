"""The tests that every op has on the host, drawn from its ``cases.py``.

A test file derives from :class:`OpSuite`, and adds what is particular to its op::

    class TestGroupNormSilu(OpSuite):
        op = op
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import fastsd_kernels
from fastsd_kernels import cpu_runtime
from fastsd_kernels.dispatch import Op
from fastsd_kernels.testing import check_op, named
from tests.flops import flops_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class OpSuite:
    op: Op
    # gradcheck's steps of 1e-6 around values of 30 000 drown in the reference's rounding
    not_smooth: tuple[str, ...] = ("large_mean",)

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        cases = cls.op.cases
        names = [sample.name for sample in cases.samples("cpu", torch.float32)]
        # opcheck compares with ==, which NaN never passes
        finite = [name for name in names if not name.startswith(("nan", "inf"))]
        smooth = [name for name in finite if not name.startswith(cls.not_smooth)]
        for argument, values in (
            ("dtype", DTYPES),
            ("name", names),
            ("finite_name", finite),
            ("smooth_name", smooth),
            ("bad_sample", list(cases.bad_samples("cpu"))),
        ):
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values, ids=str)

    def call(self, **kwargs: Any) -> Tensor:
        return getattr(fastsd_kernels, self.op.name)(**kwargs)

    def test_contract(self, dtype: torch.dtype, name: str) -> None:
        check_op(self.op, named(self.op.cases.samples("cpu", dtype), name), "cpu")

    @pytest.mark.parametrize("isa", cpu_runtime.ISAS[:-1])
    def test_narrower_instruction_sets(self, isa: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        index = cpu_runtime.ISAS.index(isa)
        if index > cpu_runtime.isa():
            pytest.skip(f"this processor has no {isa}")
        monkeypatch.setattr(cpu_runtime, "isa", lambda: index)
        for dtype in DTYPES:
            check_op(self.op, named(self.op.cases.samples("cpu", dtype), name), "cpu")

    def test_large_batch(self, dtype: torch.dtype) -> None:
        for sample in self.op.cases.large_samples("cpu", dtype):
            check_op(self.op, sample, "cpu")

    def test_bad_input(self, bad_sample: Any) -> None:
        with pytest.raises(bad_sample.error) as caught:
            self.call(**bad_sample.kwargs)
        for words in bad_sample.says:
            assert words in str(caught.value)

    def test_opcheck(self, finite_name: str) -> None:
        sample = named(self.op.cases.samples("cpu", torch.float32), finite_name)
        opcheck(getattr(torch.ops.fastsd, self.op.name), (), sample.kwargs)

    def test_flops_are_those_of_the_definition(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        sample = named(self.op.cases.samples("cpu", torch.float32), name).requiring_grad()
        reference, given = self.op.backends["reference"].module, []
        with monkeypatch.context() as patch:
            patch.setattr(reference, "run", lambda *args: given.extend(args) or torch.empty_like(args[0]))
            self.call(**sample.kwargs, backend="reference")
        forward = flops_of(lambda: reference.run(*given))
        assert flops_of(lambda: self.call(**sample.kwargs)) == forward
        if not name.startswith("only_bias"):  # torch's norm has no gradient then where a mode looks on
            # the backward pass evaluates the definition again, and differentiates that
            again = flops_of(lambda: reference.run(*given).sum().backward())
            assert flops_of(lambda: self.call(**sample.kwargs).sum().backward()) == forward + again

    def test_gradients(self, smooth_name: str) -> None:
        sample = named(self.op.cases.samples("cpu", torch.float64), smooth_name)
        sample = sample.map_tensors(Tensor.double).requiring_grad()
        tensors = {key: value for key, value in sample.kwargs.items() if isinstance(value, Tensor)}
        others = {key: value for key, value in sample.kwargs.items() if key not in tensors}
        torch.autograd.gradcheck(
            lambda *values: self.call(**dict(zip(tensors, values, strict=True)), **others),
            tuple(tensors.values()),
            fast_mode=True,
        )
