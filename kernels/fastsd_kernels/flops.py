"""Importing this module has ``torch.utils.flop_counter.FlopCounterMode`` count the ops from then on.

Counted are the multiplications and additions of the products in an op's definition, whatever algorithm runs. It is a
module of its own because torch's counter imports Triton, which ``import fastsd_kernels`` must not.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

import fastsd_kernels  # noqa: F401, which declares the ops
from fastsd_kernels.dispatch import ops

for _op in ops():
    if _op.flops is not None:
        register_flop_formula(getattr(torch.ops.fastsd, _op.name), get_raw=True)(_op.flops)
