"""What a parser does, the parser of plain text, and how parsers are put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from .parts import Arguments, Call, Part, Text


class Parser(Protocol):
    """Splits one answer into parts while its text comes.

    The joined parts (``Answer.of``) are a function of the joined text: where the text is cut makes no difference.
    """

    def feed(self, text: str) -> list[Part]:
        """Takes more text. Returns the parts that later text cannot change."""
        ...

    def finish(self, *, cut: bool = False) -> list[Part]:
        """Returns what was held back, because no text follows.

        Args:
            cut: a limit or a stop string ended the answer, not the model. An unfinished marker at the end, or an
                unfinished call whose name is not known yet, is left out then. Otherwise it is text.
        """
        ...


CallIds = Callable[[int], str]
"""Returns a hexadecimal digest for an answer's call, given the call's index."""
MakeParser = Callable[[CallIds], Parser]


class Plain:
    """Everything is visible text."""

    def feed(self, text: str) -> list[Part]:
        return [Text(text=text)] if text else []

    def finish(self, *, cut: bool = False) -> list[Part]:
        return []

    @classmethod
    def make(cls, _ids: CallIds) -> Parser:
        """Returns a parser for one answer."""
        return cls()


class Chain:
    """Feeds the visible text of one parser to the next."""

    def __init__(self, first: Parser, then: Parser):
        self._first, self._then = first, then

    def feed(self, text: str) -> list[Part]:
        return self._passed(self._first.feed(text))

    def finish(self, *, cut: bool = False) -> list[Part]:
        return [*self._passed(self._first.finish(cut=cut)), *self._then.finish(cut=cut)]

    def _passed(self, parts: Iterable[Part]) -> list[Part]:
        passed: list[Part] = []
        for part in parts:
            passed += self._then.feed(part.text) if isinstance(part, Text) else [part]
        return passed


class FirstCall:
    """Leaves out every tool call but the first."""

    def __init__(self, inner: Parser):
        self._inner = inner

    def feed(self, text: str) -> list[Part]:
        return _first(self._inner.feed(text))

    def finish(self, *, cut: bool = False) -> list[Part]:
        return _first(self._inner.finish(cut=cut))


def _first(parts: Iterable[Part]) -> list[Part]:
    return [part for part in parts if not (isinstance(part, Call | Arguments) and part.index)]
