"""Prefix caching: which slots hold the keys and values of a prompt's beginning, and which slot it takes.

A slot keeps what its last sequence left until another one takes it. A new prompt takes over the
longest prefix found in any slot, busy or free: in place if its own slot has it, as a copy otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...decoding.text.prefix import common_prefix


class PrefixCache:
    """What prefill left in B slots.

    Only keys that prefill made are known here, not those of generated tokens: a decode forward has
    another number of rows, hence other last bits. A prompt shorter than what it has in common with a
    slot is there as a whole; otherwise the prefix ends at a chunk boundary, so that every chunk that is
    computed has the rows it would have alone, and the same bits.

    Args:
        batch: B. chunk: tokens of one prefill forward. enabled: False finds nothing.
    """

    def __init__(self, batch: int, chunk: int, *, enabled: bool = True):
        self.held: list[list[int]] = [[] for _ in range(batch)]
        """Tokens whose keys stand in each slot, from position 0."""
        self._chunk, self._enabled = chunk, enabled
        self._used, self._now = [0] * batch, 0

    def place(self, tokens: Sequence[int], free: Sequence[int]) -> tuple[int, int]:
        """A slot of ``free`` for a prompt, and how many of its tokens it has already: one that loses
        nothing by it, the one with the longest prefix first, otherwise the least recently used."""
        common = {slot: self._common(tokens, slot) for slot in free}
        kept = [slot for slot in free if common[slot] == len(self.held[slot])]
        slot = max(kept or free, key=lambda s: (common[s] if kept else 0, -self._used[s]))
        length = self._usable(common[slot], len(tokens))
        self.hold(slot, tokens[:length])
        return slot, length

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The slot that has the longest prefix of a prompt, busy or free, and its length."""
        length, source = max(
            (self._usable(self._common(tokens, slot), len(tokens)), slot) for slot in range(len(self.held))
        )
        if length:
            self.touch(source)
        return source, length

    def hold(self, slot: int, tokens: Sequence[int]) -> None:
        """The slot has the keys of ``tokens`` now, and of nothing behind them."""
        self.held[slot] = list(tokens)
        self.touch(slot)

    def touch(self, slot: int) -> None:
        """It was used just now."""
        self._now += 1
        self._used[slot] = self._now

    def _common(self, tokens: Sequence[int], slot: int) -> int:
        return common_prefix(tokens, self.held[slot]) if self._enabled else 0

    def _usable(self, common: int, wanted: int) -> int:
        return common if common == wanted else common // self._chunk * self._chunk
