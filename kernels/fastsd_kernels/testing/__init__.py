"""The proving ground that travels with the kernels: inputs every op is tried with, and the numerical contract.

The test suite, ``opcheck`` and ``fastsd doctor`` all draw from here. A new op writes a ``cases.py`` with
``samples(device, dtype)`` and ``bad_samples(device)``, built from :mod:`fastsd_kernels.testing.inputs`.
"""

from fastsd_kernels.testing.contract import ContractViolation, assert_contract, check_op, check_result
from fastsd_kernels.testing.inputs import BadSample, Sample, feature_map, feature_maps, named

__all__ = [
    "BadSample",
    "ContractViolation",
    "Sample",
    "assert_contract",
    "check_op",
    "check_result",
    "feature_map",
    "feature_maps",
    "named",
]
