"""Planted faults, and a runner that says which of them the tests notice: ``python -m tests.mutants``."""
