"""The parts of an answer, in the order they come. Every front door writes its own events from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Some of the answer's visible text."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reasoning:
    """Some of the text that the model thought before it answered."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A tool call begins."""

    index: int
    """Which of the answer's calls, from 0."""
    id: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Some of the JSON text of a call's arguments."""

    index: int
    text: str


Part = Text | Reasoning | Call | Arguments


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeCall:
    """A tool call with all of its arguments."""

    id: str
    name: str
    arguments: str
    """JSON text, exactly as the model wrote it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A whole answer. Equal answers have equal parts, however the parts were cut."""

    text: str
    reasoning: str
    calls: tuple[WholeCall, ...]

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Answer:
        """Joins the parts of one answer."""
        text: list[str] = []
        reasoning: list[str] = []
        begun: dict[int, Call] = {}
        arguments: dict[int, list[str]] = {}
        for part in parts:
            match part:
                case Text():
                    text.append(part.text)
                case Reasoning():
                    reasoning.append(part.text)
                case Call():
                    begun[part.index], arguments[part.index] = part, []
                case Arguments():
                    arguments[part.index].append(part.text)
        calls = tuple(
            WholeCall(id=call.id, name=call.name, arguments="".join(arguments[index])) for index, call in begun.items()
        )
        return cls(text="".join(text), reasoning="".join(reasoning), calls=calls)
