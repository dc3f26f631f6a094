"""Which sequence has which slot of the verifier."""

from __future__ import annotations

from collections.abc import Callable

from ...models.runner import ForwardRunner
from .prompts import PrefixCache, Prompts
from .sequence import TargetSequence


class Slots:
    """B slots: sequences that decode, sequences whose prompt is being computed, and the queue for free slots.

    Args:
        runner: of the target model.
        prefix_caching: reuse keys that earlier prompts left in the slots.
    """

    def __init__(self, runner: ForwardRunner, *, prefix_caching: bool):
        self.rows: list[TargetSequence | None] = [None] * runner.batch
        """Sequences that decode, by slot."""
        self.prompts = Prompts(runner, PrefixCache(runner.batch, runner.chunk, enabled=prefix_caching))

    @property
    def idle(self) -> bool:
        """Whether there is no request at all."""
        return not (self.prompts.waiting or self.prompts.filling or self.decoding)

    @property
    def decoding(self) -> bool:
        """Whether any sequence decodes."""
        return any(row is not None for row in self.rows)

    @property
    def blocked(self) -> bool:
        """Whether requests wait for something other than a slot, and there is nothing else to do."""
        return bool(self.prompts.waiting) and not self.admitted

    @property
    def used(self) -> list[int]:
        """Slots in which a sequence decodes."""
        return [slot for slot, row in enumerate(self.rows) if row is not None]

    @property
    def admitted(self) -> list[tuple[int, TargetSequence]]:
        """Slots and their sequences: those that decode, then those whose prompt is being computed."""
        return [*((slot, row) for slot, row in enumerate(self.rows) if row is not None), *self.prompts.filling.items()]

    def length(self, slot: int) -> int:
        """L of a slot: tokens that have keys and values, which a forward over the slot must not overwrite."""
        row = self.rows[slot]
        return len(self.prompts.prefixes.held[slot]) if row is None else len(row.tokens)

    def admit(self, ready: Callable[[TargetSequence], bool]) -> None:
        """Give free slots to waiting requests that are ready, with what those or other slots hold of their prompts."""
        self.prompts.admit([slot for slot, row in enumerate(self.rows) if row is None], ready)

    def find(self, request: int) -> int | None:
        """The slot of a request, if it has one."""
        return next((slot for slot, row in self.admitted if row.request == request), None)

    def free(self, slot: int) -> None:
        """Forget the slot's sequence. Its keys stay until another sequence takes the slot."""
        self.rows[slot] = None
        self.prompts.leave(slot)
