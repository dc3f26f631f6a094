"""The verifier's prompts: they wait for a slot, reuse what the slots hold of them, and are then computed chunk by chunk
between rounds.

A slot keeps the keys of its last sequence until another one takes it. A new prompt reuses the longest prefix found in
any slot, busy or free: in place if its own slot has it, as a copy otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from ...decoding.logprobs import token_logprobs
from ...decoding.text.prefix import common_prefix
from ...models.runner import ForwardRunner
from ..transport.messages import Scored
from .sequence import NOT_FINITE, TargetSequence


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

    def admit(self, idle: Sequence[int], ready: Callable[[TargetSequence], bool] = lambda row: True) -> None:
        """Give slots to waiting sequences.

        Args:
            idle: slots in which nothing decodes.
            ready: whether a sequence may have one. Those that may not let others pass.
        """
        free = [slot for slot in idle if slot not in self.filling]
        while free and (row := next((row for row in self.waiting if ready(row)), None)) is not None:
            self.waiting.remove(row)
            slot, row.cached = self.prefixes.place(row.reusable, free)
            row.reused = row.cached
            self.filling[slot] = row
            self._take_over(slot, row)  # before its source is given away
            free.remove(slot)

    def compute(self) -> tuple[bool, list[tuple[int, TargetSequence]], Scored | None]:
        """Compute one chunk of the prompt that came first.

        Returns:
            whether there was a chunk to compute; the slots and sequences whose prompt is complete or failed
            (``error``), which are no longer in ``filling``; log-probabilities of the chunk, if asked for.
        """
        computed, complete, scored = False, [], None
        for slot, row in list(self.filling.items()):
            chunk = row.tokens[row.cached : row.cached + self._runner.chunk]
            if chunk and not computed:
                if row.params.prompt_logprobs is None:
                    self._runner.prefill(slot, chunk, start=row.cached)
                else:
                    scored = self._score(slot, row, chunk, row.params.prompt_logprobs)
                row.cached += len(chunk)
                self.prefixes.hold(slot, row.tokens[: row.cached])
                computed = True
            if row.cached == len(row.tokens) or row.error is not None:
                complete.append((slot, self.filling.pop(slot)))
                for other, waits in self.filling.items():  # now: the slot may be given away before their turn
                    self._take_over(other, waits)
        return computed, complete, scored

    def _score(self, slot: int, row: TargetSequence, chunk: list[int], count: int) -> Scored | None:
        """Compute a chunk and the log-probabilities of the tokens after each of its own. None: ``row.error`` says why
        there are none."""
        start = row.cached
        logits = self._runner.prefill_logits(slot, chunk, start=start)
        finite = logits.amax(-1).isfinite().tolist()
        if not all(finite):
            row.error = NOT_FINITE.format(start + finite.index(False) + 1)
            return None
        following = row.certain[start + 1 : start + 1 + len(chunk)]
        return Scored(request=row.request, logprobs=list(token_logprobs(logits, following, count)))

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
        source, length = self.prefixes.find(row.reusable)
        if length > row.cached:
            self._runner.copy(source, slot, length)
            self.prefixes.hold(slot, row.tokens[:length])
            row.reused += length - row.cached
            row.cached = length


class PrefixCache:
    """The keys that prefill left in B slots.

    Only keys that prefill computed count, not those of generated tokens: a decode forward has another number of rows,
    and so other last bits. If a slot holds the whole prompt, all of it is reused. Otherwise the reused prefix ends at
    a chunk boundary, so that every chunk that is computed has the rows, and the bits, it would have alone.

    Args:
        batch: B.
        chunk: tokens of one prefill forward.
        enabled: False finds nothing.
    """

    def __init__(self, batch: int, chunk: int, *, enabled: bool = True):
        self.held: list[list[int]] = [[] for _ in range(batch)]
        """The tokens whose keys each slot holds, from position 0."""
        self._chunk, self._enabled = chunk, enabled
        self._used, self._now = [0] * batch, 0

    def place(self, tokens: Sequence[int], free: Sequence[int]) -> tuple[int, int]:
        """Choose a slot for a prompt.

        Prefers slots that lose no keys by it, and among those the longest prefix; otherwise the least recently used.

        Args:
            tokens: the prompt.
            free: slots to choose from, not empty.

        Returns:
            the slot, and how many of the prompt's tokens it has already.
        """
        common = {slot: self._common(tokens, slot) for slot in free}
        kept = [slot for slot in free if common[slot] == len(self.held[slot])]
        slot = max(kept or free, key=lambda s: (common[s] if kept else 0, -self._used[s]))
        length = self._usable(common[slot], len(tokens))
        self.hold(slot, tokens[:length])
        return slot, length

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The slot with the longest prefix of a prompt, busy or free, and the prefix's length."""
        length, source = max(
            (self._usable(self._common(tokens, slot), len(tokens)), slot) for slot in range(len(self.held))
        )
        if length:
            self.touch(source)
        return source, length

    def hold(self, slot: int, tokens: Sequence[int]) -> None:
        """Note that the slot holds the keys of exactly these tokens."""
        self.held[slot] = list(tokens)
        self.touch(slot)

    def touch(self, slot: int) -> None:
        """Note that the slot was used just now."""
        self._now += 1
        self._used[slot] = self._now

    def _common(self, tokens: Sequence[int], slot: int) -> int:
        return common_prefix(tokens, self.held[slot]) if self._enabled else 0

    def _usable(self, common: int, wanted: int) -> int:
        return common if common == wanted else common // self._chunk * self._chunk
