"""Incremental detokenizing: text is released only when later tokens cannot change it."""

from __future__ import annotations

from typing import Any

_REPLACEMENT = "\ufffd"
_WINDOW = 6  # tokens decoded again for context; tokenizers look back a few at most


class Detokenizer:
    """Turns a growing list of token ids into text and finds stop strings.

    ``text`` is all final text. Text that may be the beginning of a stop string, and bytes that are not yet a whole
    character, are held back until later tokens decide.

    Args:
        tokenizer: A transformers tokenizer; only its ``decode`` is used.
        stop: Stop strings.
        include_stop: Keep the stop string at the end of the text.
        min_tokens: Ignore stop strings that these first tokens complete.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], *, include_stop: bool = False, min_tokens: int = 0):
        self._tokenizer, self._stop = tokenizer, stop
        self._include_stop, self._min_tokens = include_stop, min_tokens
        self._ids: list[int] = []
        self._start = self._read = 0  # window being decoded: [start, read) is already text
        self._decoded = ""
        self.given = 0
        """Characters released."""
        self.found: str | None = None
        """The stop string that ended the text."""

    @property
    def stopped(self) -> bool:
        return self.found is not None

    @property
    def text(self) -> str:
        return self._decoded[: self.given]

    def add(self, token_ids: list[int]) -> str:
        """Adds tokens and returns the text that became final. At a stop string the text ends, and ``found`` and
        ``stopped`` are set.

        To find the token that completed a stop string, add tokens one at a time.
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
            # The token that completes a stop string may end in half a character. Do not wait for the other half.
            self._append(whole[len(self._decoded) :])
        return self._give(len(self._decoded) if self.stopped else len(self._decoded) - self._held())

    def finish(self) -> str:
        """Releases and returns the text held back, because no token follows."""
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
        """Returns start and text of the first stop string that ends beyond the decoded text, if there is one."""
        if not self._stop or len(self._ids) <= self._min_tokens:
            return None
        # None that counts ends within the decoded text: it would have been found before.
        known = len(self._decoded) + 1
        found = [(at, s) for s in self._stop if (at := text.find(s, max(0, known - len(s)))) >= 0]
        return min(found, default=None)

    def _give(self, upto: int) -> str:
        fresh = self._decoded[self.given : max(self.given, upto)]
        self.given = max(self.given, upto)
        return fresh

    def _held(self) -> int:
        """Returns the length of the longest suffix of the text that is a prefix of a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._decoded)), longest, -1):
                if self._decoded.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
