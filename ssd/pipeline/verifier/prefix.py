"""Prefix caching: which slots hold the keys and values of a prompt's prefix, and which slot a prompt gets.

A slot keeps the keys of its last sequence until another one takes it. A new prompt reuses the longest prefix found in
any slot, busy or free: in place if its own slot has it, as a copy otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...decoding.text.prefix import common_prefix


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
