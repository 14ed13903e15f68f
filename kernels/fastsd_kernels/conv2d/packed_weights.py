"""Transformed copies of weights, kept from call to call within a bound.

Winograd's algorithms multiply with weights that are transformed to 16/9 or 4 times their size. That costs as much as
the convolution of a small map, so it is worth keeping; a :class:`WeightBudget` says how much memory it may take.
Without one a copy lives for one call.

A copy is used only if its source still has the shape, the strides and the 64-bit digest of what it was made from. That
is checked at every call, by reading the weight: an edit through ``.data``, which fusing an adapter does, leaves no
other trace. Reading costs about a hundredth of a convolution of a large map, a tenth of one at 16². While another
thread edits a weight, a call sees some of the edit, as it would without a copy; the next one sees all of it.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastsd_kernels import cpu_runtime


@dataclass(frozen=True)
class Copy:
    """A copy of a weight, for the algorithm with this tile on maps of so many positions.

    ``source``: what tells whether the weight is still what it was.
    """

    packed: Tensor
    tile: int
    source: tuple[Any, ...]
    positions: int


class WeightBudget:
    """How many bytes the copies of some weights may take, and these copies; both end with the last reference to it.

    Where the bytes do not suffice for all, weights of larger maps come first: a copy saves the same time a byte
    everywhere, but the algorithms without one lose more on large maps.

    Args:
        max_bytes: at most this much.

    Raises:
        ValueError: a negative bound.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes: expected a number that is not negative; got {max_bytes}")
        self.max_bytes = max_bytes
        self._copies = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def admit(self, weight: Tensor) -> None:
        """Let copies of ``weight`` be kept here from now on."""
        _budgets[weight] = weakref.ref(self)

    def bytes_of(self, weight: Tensor) -> int:
        """What the copy of ``weight`` takes, 0 if there is none."""
        copy = self._copies.get(weight)
        return 0 if copy is None else copy.packed.nbytes

    @property
    def used_bytes(self) -> int:
        """What all copies take."""
        with self._lock:
            return self._sum()

    def _sum(self) -> int:
        return sum(copy.packed.nbytes for copy in self._copies.values())

    def clear(self) -> None:
        """Forget every copy; the next calls make them anew."""
        with self._lock:
            self._copies.clear()

    def room_for(self, weight: Tensor, positions: int) -> int:
        """How many bytes a copy of ``weight`` for a map of so many positions may take to be kept."""
        with self._lock:
            larger_maps = (c for w, c in self._copies.items() if w is not weight and c.positions >= positions)
            return self.max_bytes - sum(copy.packed.nbytes for copy in larger_maps)

    def forget(self, weight: Tensor) -> None:
        """Free the copy of ``weight``, if there is one."""
        with self._lock:
            self._copies.pop(weight, None)

    def _find(self, weight: Tensor, tile: int) -> Copy | None:
        copy = self._copies.get(weight)
        return copy if copy is not None and copy.tile == tile else None

    def _keep(self, weight: Tensor, copy: Copy) -> None:
        with self._lock:
            self._copies[weight] = copy
            smallest_maps_first = sorted(self._copies.items(), key=lambda pair: pair[1].positions)
            for other, _ in smallest_maps_first:
                if self._sum() <= self.max_bytes:
                    break
                if other is not weight:
                    del self._copies[other]


_budgets = WeakTensorKeyDictionary()


def budget_of(weight: Tensor) -> WeightBudget | None:
    """The budget that copies of ``weight`` are kept in; ``None`` for one without, or that cannot be digested."""
    reference = _budgets.get(weight)
    if reference is None or weight.dtype != torch.float32:
        return None
    is_dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    return reference() if is_dense else None


def kept(weight: Tensor) -> Copy | None:
    """The copy of ``weight`` that is there, if one is; it may be out of date."""
    budget = budget_of(weight)
    return None if budget is None else budget._copies.get(weight)


def forget(weight: Tensor) -> None:
    """Free the copy of ``weight``, which is not going to be used."""
    reference = _budgets.get(weight)
    budget = None if reference is None else reference()
    if budget is not None:
        budget.forget(weight)


def packed(weight: Tensor, tile: int, positions: int, pack: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``pack(weight, tile)``, or a copy that is kept of it.

    Args:
        weight: of any strides and dtype; copies are kept of float32 without gaps.
        tile: the algorithm's.
        positions: of the map that it is wanted for.
        pack: makes the copy.
    """
    budget = budget_of(weight)
    if budget is None:
        return pack(weight, tile)
    copy = budget._find(weight, tile)
    if copy is not None and copy.source == _source(weight):
        return copy.packed
    before = _source(weight)
    made = pack(weight, tile)
    # another thread may have edited the weight meanwhile
    if budget.room_for(weight, positions) >= made.nbytes and _source(weight) == before:
        budget._keep(weight, Copy(made, tile, before, positions))
    else:
        budget.forget(weight)
    return made


def _source(weight: Tensor) -> tuple[Any, ...]:
    """What tells whether a weight is what it was."""
    return weight.shape, weight.stride(), torch.ops.fastsd_cpu.digest.default(weight, cpu_runtime.isa())
