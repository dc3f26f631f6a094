"""One sequence inside the draft."""

from __future__ import annotations

from dataclasses import dataclass

from ...decoding.processors import Constraint
from ...decoding.text.ngram import NgramIndex


@dataclass(slots=True)
class DraftRow:
    """One sequence inside the draft."""

    tokens: list[int]
    """Committed, the root excluded."""
    cached: int
    """How many of them have keys and values here."""
    forecasts: bool
    """Whether outcomes are prepared for it (``ssd``), or only misses served (``sd``)."""
    number: int
    """How many came before it."""
    ngrams: NgramIndex | None = None
    """Of its tokens, where missed rows may take candidates from it."""
    constraint: Constraint | None = None
    """The grammar of its output, after the certain tokens, the root among them."""

    @property
    def whole(self) -> bool:
        """Whether the next forward may take it along."""
        return self.cached == len(self.tokens)
