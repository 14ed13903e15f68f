"""Smaller U-Nets: plans, recipes, and the models that they make."""

from fastsd.compress.apply import compress
from fastsd.compress.plan import Plan, PlanError
from fastsd.compress.recipes import RECIPES, recipe
from fastsd.compress.storage import CheckpointError, load

__all__ = ["RECIPES", "CheckpointError", "Plan", "PlanError", "compress", "load", "recipe"]
