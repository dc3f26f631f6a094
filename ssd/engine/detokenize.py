"""Incremental detokenizing: text is released only when later tokens cannot change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..request.sampling_params import SamplingParams
from .token_text import TextStream


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRules:
    """Where a text ends, apart from its last token."""

    strings: tuple[str, ...] = ()
    include: bool = False
    """Keep the stop string at the end of the text."""
    min_tokens: int = 0
    """Ignore stop strings that these first tokens complete."""

    @classmethod
    def of(cls, params: SamplingParams) -> StopRules:
        """Returns the rules a request asks for."""
        return cls(strings=params.stop, include=params.include_stop_str_in_output, min_tokens=params.min_tokens)


class Detokenizer:
    """Turns a growing list of token ids into text and finds stop strings.

    The text is that of one decode of all tokens. Text that may be the beginning of a stop string, and bytes whose text
    later tokens may change, are held back until later tokens decide. A stop string may contain special tokens, also
    those that are not part of the text.

    Args:
        stream: Decodes the tokens.
        stop: Stop strings; none by default.
    """

    def __init__(self, stream: TextStream, stop: StopRules | None = None):
        self._stream, self._stop = stream, stop or StopRules()
        self._longest = max(map(len, self._stop.strings), default=0)
        self._released: list[str] = []
        self._waiting = ""
        """Final text that is not released. Every stop string that may become complete begins in it or after it."""
        self._open = ""
        """The complete characters that would follow it if no token followed."""
        self._marks: list[tuple[int, str]] = []
        """Special tokens of stop strings that are not part of the text: their places in the waiting and the open text,
        and their names."""
        self._known = ("", "")
        """The views already searched."""
        self._count = 0
        self.found: str | None = None
        """The stop string that ended the text."""

    @property
    def stopped(self) -> bool:
        return self.found is not None

    @property
    def text(self) -> str:
        """All text released."""
        return "".join(self._released)

    def add(self, token_ids: Sequence[int]) -> str:
        """Adds tokens and returns the text that became final. At the token that completes a stop string the text ends,
        and ``found`` and ``stopped`` are set. Tokens after it are ignored."""
        return "".join(map(self._add, token_ids))

    def finish(self) -> str:
        """Releases and returns the text held back, because no token follows."""
        if not self.stopped:
            self._take(self._stream.tail, "")
        return self._release(len(self._waiting))

    def _add(self, token: int) -> str:
        if self.stopped:
            return ""
        self._count += 1
        if not self._stop.strings:
            self._waiting = self._stream.add(token)
            return self._release(len(self._waiting))
        marker = self._stream.marker(token)
        if marker and any(marker in stop for stop in self._stop.strings):
            self._marks.append((len(self._waiting) + len(self._open), marker))
        self._take(self._stream.add(token), self._stream.open)
        return self._release(len(self._waiting) if self.stopped else self._certain())

    def _take(self, fresh: str, following: str) -> None:
        """Appends final text. If it, or what follows it, completes a stop string, the text ends there."""
        self._waiting, self._open = self._waiting + fresh, following
        if self._count <= self._stop.min_tokens:
            return
        found: list[tuple[int, str]] = []
        for (text, places), known in zip(self._views(), self._known, strict=True):
            # None that counts ends within the known text: it would have been found before.
            before = _common(known, text)
            for stop in self._stop.strings:
                if (at := text.find(stop, max(0, before + 1 - len(stop)))) >= 0:
                    found.append((places[at], stop))
        if found:
            at, self.found = min(found)
            self._waiting = (self._waiting + following)[:at] + (self.found if self._stop.include else "")

    def _release(self, count: int) -> str:
        """Releases the first characters of the waiting text and returns them."""
        text, self._waiting = self._waiting[:count], self._waiting[count:]
        self._released.append(text)
        if self._stop.strings:
            self._marks = [(at - count, name) for at, name in self._marks if at >= count][-self._longest :]
            (plain, _), (marked, _) = self._views()
            self._known = plain, marked
        return text

    def _certain(self) -> int:
        """Returns how many characters of the waiting text cannot belong to a stop string."""
        certain = len(self._waiting)
        for text, places in (_view(self._waiting, ()), _view(self._waiting, self._marks)):
            longest = 0
            for stop in self._stop.strings:
                for length in range(min(len(stop) - 1, len(text)), longest, -1):
                    if text.endswith(stop[:length]):
                        longest = length
                        break
            certain = min(certain, places[len(text) - longest])
        return certain

    def _views(self) -> tuple[_View, _View]:
        """Returns the waiting and the open text, without and with the special tokens left out of it."""
        whole = self._waiting + self._open
        return _view(whole, ()), _view(whole, self._marks)


_View = tuple[str, Sequence[int]]
"""A text, and for each of its characters and its end the place in the text without special tokens."""


def _common(known: str, text: str) -> int:
    """Returns how many characters at the beginning are equal."""
    if text.startswith(known):
        return len(known)
    return next((i for i, (a, b) in enumerate(zip(known, text, strict=False)) if a != b), len(text))


def _view(text: str, marks: Sequence[tuple[int, str]]) -> _View:
    """Returns a text with special tokens inserted.

    Args:
        marks: Their places and names, in order. Those beyond the end are left out.
    """
    if not marks:
        return text, range(len(text) + 1)
    parts: list[str] = []
    places: list[int] = []
    begin = 0
    for at, name in marks:
        if at <= len(text):
            parts += [text[begin:at], name]
            places += [*range(begin, at), *[at] * len(name)]
            begin = at
    return "".join([*parts, text[begin:]]), [*places, *range(begin, len(text) + 1)]
