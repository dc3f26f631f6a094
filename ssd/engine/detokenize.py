"""Incremental detokenizing: text is given out only when later tokens cannot change it."""

from __future__ import annotations

from typing import Any

_REPLACEMENT = "\ufffd"
_WINDOW = 6  # tokens decoded again for context; tokenizers look back at most a few


class Detokenizer:
    """Turns a growing list of token ids into text and finds stop strings.

    ``text`` is all text that is certain; text that may still be the beginning of a stop string,
    and bytes that do not yet make a character, are held back until they are decided.

    Args:
        include_stop: leave the stop string at the end of the text.
        min_tokens: stop strings that the first so many tokens complete are text like any other.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], *, include_stop: bool = False, min_tokens: int = 0):
        self._tokenizer, self._stop = tokenizer, stop
        self._include_stop, self._min_tokens = include_stop, min_tokens
        self._ids: list[int] = []
        self._start = self._read = 0  # window being decoded: [start, read) is already text
        self._decoded = ""
        self.given = 0
        self.found: str | None = None
        """The stop string that ended the text."""

    @property
    def stopped(self) -> bool:
        return self.found is not None

    @property
    def text(self) -> str:
        return self._decoded[: self.given]

    def add(self, token_ids: list[int]) -> str:
        """New certain text. Sets ``found`` and ``stopped`` (the text then ends at the stop string).

        Where a stop string must end the tokens too, give them one at a time.
        """
        if self.stopped:
            return ""
        self._ids.extend(token_ids)
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        fresh = after[len(before) :]
        if fresh and not after.endswith(_REPLACEMENT):
            self._append(fresh)
            self._start, self._read = max(self._start, len(self._ids) - _WINDOW), len(self._ids)
        elif self._stop and self._find(whole := self._decoded + fresh.rstrip(_REPLACEMENT)):
            # The token that completes a stop string may end in half a character: do not wait for
            # the other half.
            self._append(whole[len(self._decoded) :])
        return self._give(len(self._decoded) if self.stopped else len(self._decoded) - self._held())

    def finish(self) -> str:
        """What was held back, once nothing more comes."""
        if not self.stopped:
            before = self._decode(self._ids[self._start : self._read])
            self._append(self._decode(self._ids[self._start :])[len(before) :])
            self._read = len(self._ids)
        return self._give(len(self._decoded))

    def _append(self, text: str) -> None:
        found = self._find(self._decoded + text)
        self._decoded += text
        if found is not None:
            at, self.found = found
            self._decoded = self._decoded[: at + len(self.found) * self._include_stop]

    def _find(self, text: str) -> tuple[int, str] | None:
        """Where the first stop string begins that ``text`` completes beyond what is decoded."""
        if not self._stop or len(self._ids) <= self._min_tokens:
            return None
        # In what is decoded already none ended, or none that counts.
        known = len(self._decoded) + 1
        found = [(at, s) for s in self._stop if (at := text.find(s, max(0, known - len(s)))) >= 0]
        return min(found, default=None)

    def _give(self, upto: int) -> str:
        fresh = self._decoded[self.given : max(self.given, upto)]
        self.given = max(self.given, upto)
        return fresh

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._decoded)), longest, -1):
                if self._decoded.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
