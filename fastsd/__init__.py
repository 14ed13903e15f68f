"""Custom kernels in Hugging Face diffusers U-Nets: patch a model, keep its function, run it faster."""

from typing import TYPE_CHECKING, Any

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
    from fastsd.nn.gri_attention import GRIAttnProcessor

__all__ = [
    "GRI",
    "GRIAttnProcessor",
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


def __getattr__(name: str) -> Any:
    # diffusers takes seconds to import, and only the processor derives from it
    if name == "GRIAttnProcessor":
        from fastsd.nn.gri_attention import GRIAttnProcessor

        return GRIAttnProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
