"""What runs a backend of an op in the tests, and the ways to do so that there are."""

import functools
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

import fastsd_kernels
from fastsd_kernels.dispatch import BackendUnavailable, Op
from fastsd_kernels.testing import Sample

Setting = Mapping[str, Any]
Needs = frozenset[Any]


class Runner(Protocol):
    """A way to run one backend of any op.

    Attributes:
        name: in test ids.
        backend: of :data:`fastsd_kernels.dispatch.BACKENDS`.
        device: where the samples' tensors are.
        dtypes: of the samples.
        settings: what a call depends on beside its arguments, such as an instruction set: values by name.
        one_in: of how many samples that bring no new pair of values one is run in `make test`.
    """

    name: str
    backend: str
    device: str
    dtypes: Sequence[torch.dtype]
    settings: Mapping[str, Sequence[Any]]
    one_in: int

    def unavailable(self) -> str | None:
        """Why nothing can run here, or ``None``."""

    def run(self, op: Op, sample: Sample, setting: Setting) -> Tensor:
        """The result of the op's public function."""

    def cost(self, op: Op, sample: Sample, setting: Setting) -> float:
        """How many new pairs of values a sample must bring to be chosen rather than another setting of it."""

    def same_bits(self, setting: Setting) -> Setting | None:
        """A setting, another or the same one again, that must give the same bits, if it is worth a second run."""

    def launches(self, op: Op, sample: Sample) -> list[Any]:
        """The kernel launches of one call, in order, none of them run.

        Raises:
            BackendUnavailable: the backend refuses the sample.
        """

    def served(self, op: Op, samples: Mapping[str, Sample]) -> dict[str, Needs]:
        """Those of ``samples`` that the backend takes and computes itself, each with what is compiled for it."""


@functools.cache
def samples(op: Op, device: str, dtype: torch.dtype) -> dict[str, Sample]:
    """An op's samples by name, the same tensors for all tests of a process: none may change them."""
    return {sample.name: sample for sample in op.cases.samples(device, dtype)}


def call(op: Op, sample: Sample, backend: str) -> Tensor:
    """The op's public function."""
    return getattr(fastsd_kernels, op.name)(**sample.kwargs, backend=backend)


def refusal(op: Op, sample: Sample, backend: str) -> str | None:
    """The sentence with which a backend refuses a sample, or ``None``; nothing is computed."""
    try:
        with mock.patch.object(op.backends[backend].module, "run", return_value=torch.empty(0)):
            call(op, sample, backend)
    except BackendUnavailable as refused:
        return str(refused)
    return None


def not_refused(op: Op, samples: Mapping[str, Sample], backend: str) -> dict[str, Needs]:
    """:meth:`Runner.served` of a backend that decides by refusing, and compiles nothing."""
    return {name: frozenset() for name, sample in samples.items() if refusal(op, sample, backend) is None}


@contextmanager
def attributes(*changes: tuple[Any, str, Any]):
    """Objects with other attributes for a while: ``(object, name, value)`` each."""
    patches = [mock.patch.object(*change) for change in changes]
    try:
        for patch in patches:
            patch.start()
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()
