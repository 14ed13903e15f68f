"""Custom kernels in Hugging Face diffusers U-Nets: patch a model, keep its function, run it faster."""

import importlib
from typing import TYPE_CHECKING, Any

from fastsd.compress import CheckpointError, Plan, PlanError, compress, load
from fastsd.gri import GRI
from fastsd.patching import (
    PatchError,
    PatchReport,
    Rule,
    patch,
    patched,
    register_rule,
    registered_rules,
    report,
    unpatch,
    unregister_rule,
)

if TYPE_CHECKING:
    from fastsd.compress.model import CompressedUNet2DConditionModel
    from fastsd.nn.cond_conv import CondConv2d
    from fastsd.nn.gri_attention import GRIAttnProcessor

# diffusers takes seconds to import, and only these derive from it
_LAZY = {
    "CompressedUNet2DConditionModel": "fastsd.compress.model",
    "CondConv2d": "fastsd.nn.cond_conv",
    "GRIAttnProcessor": "fastsd.nn.gri_attention",
}

__all__ = [
    "GRI",
    "CheckpointError",
    "CompressedUNet2DConditionModel",
    "CondConv2d",
    "GRIAttnProcessor",
    "PatchError",
    "PatchReport",
    "Plan",
    "PlanError",
    "Rule",
    "compress",
    "load",
    "patch",
    "patched",
    "register_rule",
    "registered_rules",
    "report",
    "unpatch",
    "unregister_rule",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
