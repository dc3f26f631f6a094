"""Incremental detokenizing: text is given out only when later tokens cannot change it."""

from __future__ import annotations

from typing import Any

_REPLACEMENT = "\ufffd"
_WINDOW = 6  # tokens decoded again for context; tokenizers look back at most a few


class Detokenizer:
    """Turns a growing list of token ids into text and finds stop strings.

    ``text`` is all text that is certain; text that may still be the beginning of a stop string,
    and bytes that do not yet make a character, are held back until they are decided.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]):
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._start = self._read = 0  # window being decoded: [start, read) is already text
        self._decoded = ""
        self.given = 0
        self.stopped = False

    @property
    def text(self) -> str:
        return self._decoded[: self.given]

    def add(self, token_ids: list[int]) -> str:
        """New certain text. Sets ``stopped`` (text then ends before the stop string)."""
        if self.stopped:
            return ""
        self._ids.extend(token_ids)
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        if len(after) > len(before) and not after.endswith(_REPLACEMENT):
            self._append(after[len(before) :])
            self._start, self._read = max(self._start, len(self._ids) - _WINDOW), len(self._ids)
        return self._give(len(self._decoded) if self.stopped else len(self._decoded) - self._held())

    def finish(self) -> str:
        """What was held back, once nothing more comes."""
        if not self.stopped:
            before = self._decode(self._ids[self._start : self._read])
            self._append(self._decode(self._ids[self._start :])[len(before) :])
            self._read = len(self._ids)
        return self._give(len(self._decoded))

    def _append(self, text: str) -> None:
        searched = max(0, len(self._decoded) - max((len(s) for s in self._stop), default=0))
        self._decoded += text
        found = [at for s in self._stop if (at := self._decoded.find(s, searched)) >= 0]
        if found:
            self._decoded = self._decoded[: min(found)]
            self.stopped = True

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
