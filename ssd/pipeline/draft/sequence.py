"""One sequence inside the draft."""

from __future__ import annotations

from dataclasses import dataclass

from ...decoding.processors import Constraint
from ...decoding.text.ngram import NgramIndex
from ..transport.messages import Admit


@dataclass(kw_only=True, slots=True)
class DraftRow:
    """One sequence inside the draft."""

    tokens: list[int]
    """Committed tokens without the root."""
    cached: int
    """How many of them have keys and values here."""
    forecasts: bool
    """Whether outcomes are prepared for it (``ssd``), or only misses are served (``sd``)."""
    number: int
    """How many sequences came before it."""
    ngrams: NgramIndex | None = None
    """Of its tokens; None unless missed rows may take candidates from it."""
    request: Admit
    """How the sequence was introduced."""
    awaits_grammar: bool = False
    """Whether its grammar is still being compiled; its guesses ignore it until then."""
    constraint: Constraint | None = None
    """The grammar of its output, after the certain tokens, the root included."""

    @property
    def whole(self) -> bool:
        """Whether all its keys are here, so that the next forward may include it."""
        return self.cached == len(self.tokens)


@dataclass(kw_only=True, slots=True)
class ProposedRow:
    """One sequence of a draft without a model."""

    tokens: list[int]
    """All certain tokens."""
    tree: list[int]
    """``[W - 1]``, the candidates under verification; ``ABSENT`` where there is none."""
    forecasts: bool
    """Whether it is a request of method ``ssd``, which may take n-grams."""
    ngrams: NgramIndex
    """Of its tokens."""
