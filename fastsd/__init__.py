"""Custom kernels in Hugging Face diffusers U-Nets: patch a model, keep its function, run it faster."""

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

__all__ = [
    "PatchError",
    "PatchReport",
    "Rule",
    "patch",
    "patched",
    "register_rule",
    "registered_rules",
    "report",
    "unpatch",
    "unregister_rule",
]
