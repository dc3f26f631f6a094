"""The slots that a forward covers: those in use, and others up to a compiled shape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

KEPT = 1024
"""Selections whose tensors are kept."""


class Selection(NamedTuple):
    slots: tuple[int, ...]
    """Of the rows of a forward, ascending."""
    index: Tensor | None
    """The same ``[n]`` int64 on the device; None: all slots."""

    @property
    def count(self) -> int:
        return len(self.slots)


class Selector:
    """Selects the slots of one worker's forwards.

    Args:
        batch: B, the number of slots.
        counts: how many slots a forward may cover, ascending; the last is B.
        device: of the worker.
    """

    def __init__(self, batch: int, counts: Sequence[int], device: torch.device):
        self.counts, self._device = tuple(counts), device
        self.all = self._last = Selection(tuple(range(batch)), None)
        self._made: dict[tuple[int, ...], Selection] = {self.all.slots: self.all}

    def of(self, used: Iterable[int]) -> Selection:
        """Returns the smallest selection that contains ``used``; the previous one if it still fits."""
        if len(self.counts) == 1:
            return self.all
        wanted = set(used)
        count = next(count for count in self.counts if count >= len(wanted))
        if self._last.count != count or not wanted <= set(self._last.slots):
            others = [slot for slot in self.all.slots if slot not in wanted]
            self._last = self._selection(tuple(sorted([*wanted, *others[: count - len(wanted)]])))
        return self._last

    def first(self, count: int) -> Selection:
        """Returns the selection of the first slots, for warming up."""
        return self._selection(self.all.slots[:count])

    def _selection(self, slots: tuple[int, ...]) -> Selection:
        if slots not in self._made:
            if len(self._made) == KEPT:
                self._made = {self.all.slots: self.all}
            self._made[slots] = Selection(slots, torch.tensor(slots, device=self._device))
        return self._made[slots]
