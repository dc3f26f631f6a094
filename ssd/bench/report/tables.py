"""What the reports share: tables with a title, numbers, settings in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

RATES = ("tok/s", "speedup", "acceptance", "length", "hits")
"""Headings of :func:`rates`."""


def make_table(title: str | None, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """Returns an empty table: columns of words, aligned left, then columns of numbers, aligned right."""
    table = Table(title=title, title_justify="left")
    for name in words:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def number(value: float | None, digits: int, unit: str = "") -> str:
    """Formats a number; a dash stands for a missing one."""
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def rates(row: dict[str, Any]) -> tuple[str, ...]:
    """Formats the rates of a method, as in ``ssd compare --json``, in the order of ``RATES``."""
    return (
        number(row["tokens_per_second"], 1),
        number(row["speedup"], 2, "×"),
        number(row["acceptance_rate"], 2),
        number(row["acceptance_length"], 2),
        number(row["hit_rate"], 2),
    )


def yes(value: bool) -> str:
    return "yes" if value else "no"


def one_line(text: str) -> str:
    """Returns the text with every run of white space as one space."""
    return " ".join(text.split())
