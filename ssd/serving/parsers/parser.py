"""What a parser does, and the parser of an answer that is nothing but text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .parts import Part, Text


class Parser(Protocol):
    """Splits one answer into parts while its text comes.

    The joined parts (``Answer.of``) are a function of the joined text: where the text is cut makes no difference.
    """

    def feed(self, text: str) -> list[Part]:
        """Takes more text, in characters. Returns the parts that later text cannot change."""
        ...

    def finish(self) -> list[Part]:
        """Returns what was held back, because no text follows."""
        ...


CallIds = Callable[[int], str]
"""Returns the id of an answer's call, given the call's index."""
MakeParser = Callable[[CallIds], Parser]


class Plain:
    """Everything is visible text."""

    def feed(self, text: str) -> list[Part]:
        return [Text(text=text)] if text else []

    def finish(self) -> list[Part]:
        return []

    @classmethod
    def make(cls, _ids: CallIds) -> Parser:
        """Returns a parser for one answer."""
        return cls()
