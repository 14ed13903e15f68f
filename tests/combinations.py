"""Choosing from many combinations: `make test` runs enough of them that no pair is left out, ``--full`` runs all.

Which ones are chosen changes with the commit, so that in time all are run; FASTSD_TEST_SEED repeats a choice.
"""

import functools
import hashlib
import itertools
import os
import subprocess
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import pytest


@functools.cache
def seed() -> str:
    """What all choices depend on: FASTSD_TEST_SEED, or else the commit, or "0" outside of a repository."""
    if "FASTSD_TEST_SEED" in os.environ:
        return os.environ["FASTSD_TEST_SEED"]
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "0"


def order(*parts: Hashable) -> int:
    """A number that depends on ``parts`` and on the seed, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr((seed(), *parts)).encode()).digest()[:8], "big")


def covering(combinations: Sequence[Sequence[Hashable]], strength: int = 2) -> set[int]:
    """Indices of some of ``combinations`` that have between them all that any have in ``strength`` places."""

    def groups(combination: Sequence[Hashable]) -> set[Any]:
        return set(itertools.combinations(enumerate(combination), min(strength, len(combination))))

    left = set().union(*map(groups, combinations))
    candidates = sorted(range(len(combinations)), key=lambda index: order(combinations, index))
    chosen = set()
    while left:
        best = max(candidates, key=lambda index: len(groups(combinations[index]) & left))
        chosen.add(best)
        left -= groups(combinations[best])
    return chosen


def pairwise(
    names: str,
    *axes: Sequence[Any],
    ids: Callable[[Any], str] = str,
    strength: int = 2,
    indirect: bool | Sequence[str] = False,
) -> pytest.MarkDecorator:
    """Parametrise with every combination of ``axes``; `make test` runs enough for every pair of values of two axes.

    The others are marked ``long``. Two axes have no fewer pairs than combinations: with ``strength=1`` each value of
    an axis is run at least once.
    """
    indices = list(itertools.product(*(range(len(axis)) for axis in axes)))
    chosen = covering(indices, strength)
    given = []
    for number, index in enumerate(indices):
        values = [axis[at] for axis, at in zip(axes, index, strict=True)]
        marks = () if number in chosen else pytest.mark.long
        given.append(pytest.param(*values, id="-".join(map(ids, values)), marks=marks))
    return pytest.mark.parametrize(names, given, indirect=indirect)


def each_value(names: str, *axes: Sequence[Any], ids: Callable[[Any], str] = str) -> pytest.MarkDecorator:
    """Parametrise with every combination of ``axes``, of which `make test` runs enough for every value."""
    return pairwise(names, *axes, ids=ids, strength=1)


def long(*values: Any) -> list[Any]:
    """Parameters of variants that run with ``--full`` only, behind those that always run."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


def choose_one_of(items: Sequence[Any], ids: Sequence[str]) -> None:
    """Mark all but one as ``long`` of the items that differ in nothing but their first parameter, one of ``ids``.

    The choice alternates over the items of a test, so that a test with several has some with each value.
    """
    tests: dict[str, dict[str, list[Any]]] = {}
    for item in items:
        test, _, parameters = item.nodeid.partition("[")
        (others,) = {parameters.removeprefix(name) for name in ids if parameters.startswith(name)}
        tests.setdefault(test, {}).setdefault(others, []).append(item)
    for test, alternatives in tests.items():
        keys = sorted(alternatives, key=lambda key: (is_long(alternatives[key][0]), order(test, key)))
        for number, key in enumerate(keys, start=order(test)):
            chosen = number % len(alternatives[key])
            for at, item in enumerate(alternatives[key]):
                if at != chosen:
                    item.add_marker("long")


def is_long(item: pytest.Item) -> bool:
    """Whether ``item`` runs with ``--full`` only."""
    return item.get_closest_marker("long") is not None
