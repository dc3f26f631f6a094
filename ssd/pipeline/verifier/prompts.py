"""The verifier's prompts: they wait for a slot, and are then computed chunk by chunk between rounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ...models.runner import ForwardRunner
from .prefix import PrefixCache
from .sequence import TargetSequence


class Prompts:
    """Sequences before their first round, first come, first served.

    Args:
        runner: of the target.
        prefixes: what the slots hold.
    """

    def __init__(self, runner: ForwardRunner, prefixes: PrefixCache):
        self._runner, self.prefixes = runner, prefixes
        self.waiting: deque[TargetSequence] = deque()
        self.filling: dict[int, TargetSequence] = {}
        """Sequences whose prompt is not complete yet, by slot, in the order they came."""

    def admit(self, idle: Sequence[int]) -> None:
        """Give slots to waiting sequences. ``idle``: slots in which nothing decodes."""
        free = [slot for slot in idle if slot not in self.filling]
        while self.waiting and free:
            row = self.waiting.popleft()
            slot, row.cached = self.prefixes.place(row.tokens, free)
            row.reused = row.cached
            self.filling[slot] = row
            self._take_over(slot, row)  # before its source is given away
            free.remove(slot)

    def compute(self) -> tuple[bool, list[tuple[int, TargetSequence]]]:
        """Compute one chunk of the prompt that came first.

        Returns:
            whether there was a chunk to compute, and the slots and sequences whose prompt is complete now. They are
            no longer in ``filling``.
        """
        computed, complete = False, []
        for slot, row in list(self.filling.items()):
            chunk = row.tokens[row.cached : row.cached + self._runner.chunk]
            if chunk and not computed:
                self._runner.prefill(slot, chunk, start=row.cached)
                row.cached += len(chunk)
                self.prefixes.hold(slot, row.tokens[: row.cached])
                computed = True
            if row.cached == len(row.tokens):
                complete.append((slot, self.filling.pop(slot)))
                for other, waits in self.filling.items():  # now: the slot may be given away before their turn
                    self._take_over(other, waits)
        return computed, complete

    def forget(self, request: int) -> TargetSequence | None:
        """Drop a request that waits for a slot. Returns its sequence; None if it does not wait."""
        for row in self.waiting:
            if row.request == request:
                self.waiting.remove(row)
                return row
        return None

    def leave(self, slot: int) -> None:
        """Forget the slot's sequence. The keys it computed stay."""
        self.filling.pop(slot, None)
        self.prefixes.touch(slot)

    def _take_over(self, slot: int, row: TargetSequence) -> None:
        """Copy what another slot holds of a prompt, if that is more than its own slot has."""
        source, length = self.prefixes.find(row.tokens)
        if length > row.cached:
            self._runner.copy(source, slot, length)
            self.prefixes.hold(slot, row.tokens[:length])
            row.reused += length - row.cached
            row.cached = length
