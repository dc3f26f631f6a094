"""Reading an answer piece by piece: the base of all parsers that look for markers."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator
from functools import cache
from typing import TypeVar

from .parts import Part, Text

SPACE = " \t\r\n"
_SCALAR = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzE")

Result = TypeVar("Result")
Steps = Generator[None, None, Result]
"""A step of a parser: it yields when it needs more text, and returns its result."""


class Trimmed:
    """Text without the white space next to markers.

    Args:
        after_marker: whether a marker stands before the text.
    """

    def __init__(self, *, after_marker: bool):
        self._blank, self._fresh = "", after_marker

    def add(self, text: str) -> str:
        """Takes more text. Returns what is visible whatever follows."""
        if self._fresh:
            text = text.lstrip(SPACE)
            if not text:
                return ""
            self._fresh = False
        whole = self._blank + text
        visible = whole.rstrip(SPACE)
        self._blank = whole[len(visible) :]
        return visible

    def marker(self) -> None:
        """Drops the white space at the end of the text, because a marker follows."""
        self._blank, self._fresh = "", True

    def end(self) -> str:
        """Returns the white space at the end of the text, because nothing follows."""
        blank, self._blank = self._blank, ""
        return blank


class Reader(ABC):
    """A parser that reads the answer once, from left to right.

    ``_read`` is a generator. Its steps look at as much text as a decision needs and yield until it is there, so a
    decision cannot depend on how the text was cut.

    Args:
        tokens: markers that are tokens. They come whole, so their beginning alone is text.
    """

    def __init__(self, tokens: Collection[str] = ()) -> None:
        self._tokens = frozenset(tokens)
        self._text, self._at = "", 0
        """Text that may be needed again, and how much of it is read."""
        self._over = self._cut = False
        self._parts: list[Part] = []
        self._visible = Trimmed(after_marker=False)
        self._steps = self._whole()
        next(self._steps, None)

    def feed(self, text: str) -> list[Part]:
        if text:
            self._text += text
            next(self._steps, None)
        return self._taken()

    def finish(self, *, cut: bool = False) -> list[Part]:
        self._over, self._cut = True, cut
        next(self._steps, None)
        return self._taken()

    @abstractmethod
    def _read(self) -> Steps[None]:
        """Reads the answer until nothing is left."""

    def _whole(self) -> Steps[None]:
        yield from self._read()
        yield from self._until((), self._say)
        if blank := self._visible.end():
            self._parts.append(Text(text=blank))

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _say(self, text: str) -> None:
        """Adds visible text."""
        if visible := self._visible.add(text):
            self._parts.append(Text(text=visible))

    @property
    def _ended_by_cut(self) -> bool:
        """Whether the answer was cut off here."""
        return self._cut and self._at == len(self._text)

    def _say_from(self, start: int) -> None:
        """Makes everything read since ``start`` visible text, unless the cut alone keeps it from being a call."""
        if not self._ended_by_cut:
            self._say(self._text[start : self._at])

    def _until(self, markers: tuple[str, ...], give: Callable[[str], None]) -> Steps[str | None]:
        """Reads up to a marker and past it. No marker may contain another.

        Args:
            give: takes the text before the marker, in pieces.

        Returns the marker, or None at the end of the answer.
        """
        while True:
            self._text, self._at = self._text[self._at :], 0
            if markers and (found := compiled(markers).search(self._text)) is not None:
                self._at = found.end()
                give(self._text[: found.start()])
                return found[0]
            self._at = len(self._text) - self._held(markers)
            if self._at:
                give(self._text[: self._at])
            if self._over:
                self._at = len(self._text)
                return None
            yield

    def _held(self, markers: tuple[str, ...]) -> int:
        """Returns how many characters at the end of the text may belong to a marker."""
        if not self._over:
            return begun(self._text, markers)
        return begun(self._text, tuple(one for one in markers if one not in self._tokens)) if self._cut else 0

    def _sees(self, *literals: str) -> Steps[str | None]:
        """Returns the first of the literals that stands here, without reading it. The beginning of one at the end of
        an answer that was cut off is dropped."""
        for literal in literals:
            while literal.startswith(self._text[self._at : self._at + len(literal)]):
                if len(self._text) - self._at >= len(literal):
                    return literal
                if self._over:
                    if self._cut and literal not in self._tokens:
                        self._at = len(self._text)
                    break
                yield
        return None

    def _takes(self, *literals: str) -> Steps[str | None]:
        """As ``_sees``, and reads it."""
        found = yield from self._sees(*literals)
        self._at += len(found or "")
        return found

    def _run_of(self, characters: Callable[[str], bool]) -> Steps[str]:
        """Reads as many of such characters as follow, and returns them."""
        start = self._at
        while True:
            while self._at < len(self._text) and characters(self._text[self._at]):
                self._at += 1
            if self._at < len(self._text) or self._over:
                return self._text[start : self._at]
            yield

    def _space(self) -> Steps[str]:
        """Reads white space."""
        return (yield from self._run_of(SPACE.__contains__))

    def _string(self) -> Steps[str | None]:
        """Reads a JSON string. Returns its value, or None if there is none."""
        if not (yield from self._sees('"')):
            return None
        pieces: list[str] = []
        if not (yield from self._nested(pieces.append)):
            return None
        try:
            value: str = json.loads("".join(pieces), strict=False)
            value.encode()  # half of a surrogate pair cannot be sent on
        except ValueError:
            return None
        return value

    def _nested(self, give: Callable[[str], None]) -> Steps[bool]:
        """Reads a JSON string, object or array up to the quote or bracket that closes it.

        Args:
            give: takes its text, in pieces, exactly as it stands.

        Returns whether it was closed before the answer ended.
        """
        depth, quoted, escaped = 0, False, False
        while True:
            start, closed = self._at, False
            while self._at < len(self._text) and not closed:
                character = self._text[self._at]
                self._at += 1
                if escaped:
                    escaped = False
                elif character == '"':
                    quoted = not quoted
                elif quoted:
                    escaped = character == "\\"
                elif character in "{[":
                    depth += 1
                elif character in "}]":
                    depth -= 1
                closed = depth <= 0 and not quoted
            if self._at > start:
                give(self._text[start : self._at])
            if closed or self._over:
                return closed
            yield

    def _value(self) -> Steps[bool]:
        """Reads any JSON value. Returns whether there was one."""
        if (yield from self._sees('"', "{", "[")):
            return (yield from self._nested(lambda _text: None))
        return bool((yield from self._run_of(_SCALAR.__contains__)))


@cache
def compiled(markers: tuple[str, ...]) -> re.Pattern[str]:
    """Returns a pattern that finds the first of the markers."""
    return re.compile("|".join(map(re.escape, markers)))


@cache
def _beginnings(markers: tuple[str, ...]) -> tuple[int, frozenset[str]]:
    """Returns the length of the longest beginning of a marker, and all beginnings."""
    beginnings = {marker[:length] for marker in markers for length in range(1, len(marker))}
    return max(map(len, beginnings), default=0), frozenset(beginnings)


def begun(text: str, markers: tuple[str, ...]) -> int:
    """Returns how many characters at the end of a text may be the beginning of a marker."""
    longest, beginnings = _beginnings(markers)
    lengths = range(min(longest, len(text)), 0, -1)
    return next((length for length in lengths if text[-length:] in beginnings), 0)
