"""Which samples run where: in every commit's run each sample, and each pair of values, at least once.

What an op is tried with is a product: samples, each a point of layouts, dtypes of parameters, activations, parts of an
epilogue and classes of shapes, times the dtypes and settings of a runner (instruction sets, threads, launch order, size
of tiles). ``--full`` runs all of it. Without, :func:`covering` chooses: every pair of a value of the sample with a
value of the setting, and every pair of settings, at least once; and every sample, but on a slow runner one in three of
those that bring no new pair. What stands beside a pair changes from commit to commit, and with ``FASTSD_TEST_SEED``.
"""

import functools
import itertools
import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsd_kernels.dispatch import Op, ops
from fastsd_kernels.testing import Sample
from tests.combinations import order
from tests.runners.protocol import Needs, Runner, samples

Value = tuple[str, Any]  # of one factor

# A compilation costs as much as some tens of samples, most of which bring no new pair
_PAIRS_FOR_A_COMPILATION = 20


@dataclass(frozen=True)
class Case:
    """One sample of one op on one runner."""

    op: Op
    runner: Runner
    name: str
    dtype: torch.dtype
    setting: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        settings = (f"{name}={value}" for name, value in self.setting.items())
        return "-".join((self.op.name, self.runner.name, self.name, str(self.dtype).removeprefix("torch."), *settings))

    @property
    def sample(self) -> Sample:
        return samples(self.op, self.runner.device, self.dtype)[self.name]

    @property
    def needs(self) -> Needs:
        return served(self.op, self.runner, self.dtype)[self.name]

    @property
    def values(self) -> list[Value]:
        return [("dtype", self.dtype), *self.setting.items()]


def cases(runner: Runner, choose: Callable[[Op, Runner], list[Case]]) -> list[Case]:
    """What a runner runs of all ops, by :func:`product`, :func:`covering` or :func:`largest`."""
    return [case for op in ops() for case in choose(op, runner)] if runner.unavailable() is None else []


def product(op: Op, runner: Runner) -> list[Case]:
    """All samples that the runner serves, in all its dtypes and settings."""
    names, values = runner.settings.keys(), list(itertools.product(*runner.settings.values()))
    return [
        Case(op, runner, name, dtype, dict(zip(names, setting, strict=True)))
        for dtype in runner.dtypes
        for name in served(op, runner, dtype)
        for setting in values
    ]


@functools.cache
def served(op: Op, runner: Runner, dtype: torch.dtype) -> dict[str, Needs]:
    """The samples that the runner serves, each with what has to be compiled for it."""
    return runner.served(op, samples(op, runner.device, dtype))


def largest(op: Op, runner: Runner) -> list[Case]:
    """One case: of the samples with the most arguments, in a setting that is another one for each commit."""
    everything = product(op, runner)
    most = max(len(case.sample.kwargs) for case in everything)
    return [
        random.Random(order(op.name, runner.name)).choice(
            [case for case in everything if len(case.sample.kwargs) == most]
        )
    ]


def covering(op: Op, runner: Runner) -> list[Case]:
    """A part of :func:`product`: each pair of values at least once, and each sample; little to be compiled.

    Greedy, so not the smallest. A slow runner leaves out most samples that bring no new pair, other ones each time.
    """
    shuffled = product(op, runner)
    random.Random(order(op.name, runner.name)).shuffle(shuffled)
    pairs, missing, compiled = _pairs(shuffled), 0, set[Any]()
    of_name: dict[str, list[Case]] = {}
    for case in shuffled:
        of_name.setdefault(case.name, []).append(case)
        missing |= pairs[case]

    def gain(case: Case) -> float:
        cost = runner.cost(op, case.sample, case.setting) + _PAIRS_FOR_A_COMPILATION * len(case.needs - compiled)
        return (pairs[case] & missing).bit_count() - cost

    chosen = []
    while of_name or missing:
        name = next(iter(of_name), None)
        best = max(of_name.pop(name) if name is not None else [c for c in shuffled if pairs[c] & missing], key=gain)
        if not pairs[best] & missing and order(op.name, runner.name, name) % runner.one_in:
            continue
        missing &= ~pairs[best]
        compiled |= best.needs
        chosen.append(best)
    return chosen


def _pairs(cases: list[Case]) -> dict[Case, int]:
    """The pairs of values that each case has, as the bits of an integer."""
    bits: dict[frozenset[Value], int] = {}

    def bit(*pair: Value) -> int:
        return bits.setdefault(frozenset(pair), 1 << len(bits))

    @functools.cache
    def with_traits(op: Op, name: str, value: Value) -> int:
        return sum(bit(trait, value) for trait in traits(op, name))

    return {
        case: sum(bit(*pair) for pair in itertools.combinations(case.values, 2))
        | functools.reduce(operator.or_, (with_traits(case.op, case.name, value) for value in case.values))
        for case in cases
    }


@functools.cache
def traits(op: Op, name: str) -> tuple[Value, ...]:
    """What distinguishes a sample from others of its op, as values of factors: one for each argument, and the shape."""
    sample = samples(op, "cpu", torch.float32)[name]
    return (*((key, _trait(value)) for key, value in sample.kwargs.items()), *_shape(first_tensor(sample)))


def first_tensor(sample: Sample) -> Tensor:
    return next(value for value in sample.kwargs.values() if isinstance(value, Tensor))


def _trait(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    layout = next((name for name, has in _LAYOUTS.items() if has(value)), "strided")
    return (layout, str(value.dtype), "finite" if value.isfinite().all() else "not finite")


_LAYOUTS: dict[str, Callable[[Tensor], bool]] = {
    "expanded": lambda x: 0 in x.stride(),
    "off alignment": lambda x: x.storage_offset() % 4 != 0,
    "contiguous": Tensor.is_contiguous,
    "channels last": lambda x: x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last),
}


def _shape(x: Tensor) -> Iterator[Value]:
    yield "empty", x.numel() == 0
    yield "batch of one", x.shape[0] == 1 if x.dim() > 1 else None
    yield "elements", min(x.numel().bit_length() // 4, 3)
    for axis in range(1, x.dim()):
        yield f"multiple of 8 along {axis}", x.shape[axis] % 8 == 0
