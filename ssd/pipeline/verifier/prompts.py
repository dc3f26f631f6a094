"""Prompts of the verifier: waiting for a slot, and being computed chunk by chunk between rounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ...models.runner import ForwardRunner
from .prefix import PrefixCache
from .sequence import TargetSequence


class Prompts:
    """Sequences before their first round, first come, first served."""

    def __init__(self, runner: ForwardRunner, prefixes: PrefixCache):
        self._runner, self.prefixes = runner, prefixes
        self.waiting: deque[TargetSequence] = deque()
        self.filling: dict[int, TargetSequence] = {}
        """By slot, in the order they came: those whose prompt is not whole yet."""

    def admit(self, idle: Sequence[int]) -> None:
        """Give slots to those that wait. ``idle``: slots in which nothing decodes."""
        free = [slot for slot in idle if slot not in self.filling]
        while self.waiting and free:
            row = self.waiting.popleft()
            slot, row.cached = self.prefixes.place(row.tokens, free)
            row.reused = row.cached
            self.filling[slot] = row
            self._take_over(slot, row)  # before its source is given away
            free.remove(slot)

    def compute(self) -> tuple[bool, list[tuple[int, TargetSequence]]]:
        """One chunk of the prompt that came first. Returns whether there was one to compute, and the
        sequences whose prompt is whole now: they are no longer here."""
        computed, whole = False, []
        for slot, row in list(self.filling.items()):
            chunk = row.tokens[row.cached : row.cached + self._runner.chunk]
            if chunk and not computed:
                self._runner.prefill(slot, chunk, start=row.cached)
                row.cached += len(chunk)
                self.prefixes.hold(slot, row.tokens[: row.cached])
                computed = True
            if row.cached == len(row.tokens):
                whole.append((slot, self.filling.pop(slot)))
                for other, waits in self.filling.items():  # now, for it may be gone when their turn comes
                    self._take_over(other, waits)
        return computed, whole

    def forget(self, request: int) -> TargetSequence | None:
        """Drop a request that waits for a slot."""
        for row in self.waiting:
            if row.request == request:
                self.waiting.remove(row)
                return row
        return None

    def leave(self, slot: int) -> None:
        """The slot's sequence is gone; what it computed stays."""
        self.filling.pop(slot, None)
        self.prefixes.touch(slot)

    def _take_over(self, slot: int, row: TargetSequence) -> None:
        """What any slot holds of a prompt, if that is more than it has."""
        source, length = self.prefixes.find(row.tokens)
        if length > row.cached:
            self._runner.copy(source, slot, length)
            self.prefixes.hold(slot, row.tokens[:length])
            row.reused += length - row.cached
            row.cached = length
