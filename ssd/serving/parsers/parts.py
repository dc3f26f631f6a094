"""The parts of an answer, in the order they come. Every front door writes its own events from them."""

from __future__ import annotations

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
