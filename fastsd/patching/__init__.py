"""The patch pass: plan every change, make all or none, and take them back."""

from fastsd.patching.apply import patch, patched, unpatch
from fastsd.patching.report import Entry, Part, PatchReport, report
from fastsd.patching.rule import PatchError, Rule, register_rule, registered_rules, unregister_rule
from fastsd.patching.rules import BUILT_IN

__all__ = [
    "Entry",
    "Part",
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

for _rule in BUILT_IN:
    register_rule(_rule)
