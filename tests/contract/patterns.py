"""One sample for each pattern of arguments: what torch's own checks of an op depend on."""

import functools

import torch
from torch import Tensor

from fastsd_kernels.dispatch import Op
from fastsd_kernels.testing import Sample
from tests.contract import covering

# gradcheck's steps of 1e-6 around such values drown in the reference's rounding
_NOT_SMOOTH = ("large", "huge", "tails", "constant", "long_constant", "saturated", "spike", "key_of_minus_infinity")


def is_finite(sample: Sample) -> bool:
    return all(value.isfinite().all() for value in sample.kwargs.values() if isinstance(value, Tensor))


def is_smooth(sample: Sample) -> bool:
    """Whether finite differences of the op tell its gradient."""
    return is_finite(sample) and not sample.name.startswith(_NOT_SMOOTH)


@functools.cache
def patterns(op: Op) -> tuple[str, ...]:
    """Names of finite samples, one for each set of given arguments and layout of the first."""
    found: dict[object, str] = {}
    for name, sample in covering.samples(op, "cpu", torch.float32).items():
        if is_finite(sample):
            first = covering.first_tensor(sample)
            given = frozenset(key for key, value in sample.kwargs.items() if value is not None)
            found.setdefault((given, first.is_contiguous(), first.numel() == 0), name)
    return tuple(found.values())
