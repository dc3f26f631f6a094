"""What a missed row verifies next: a draft made now, which takes time, or an n-gram, which takes none."""

from __future__ import annotations

from typing import Literal

from .governor import Mean

Source = Literal["jit", "ngram"]
TRY_EVERY = 16
"""Misses after which the source not chosen is tried once more."""


class FallbackChoice:
    """Compares what both bring per second: tokens of the round they serve over its forward and,
    for a draft made now, the wait for it."""

    def __init__(self) -> None:
        self._tokens: dict[Source, Mean] = {"jit": Mean(), "ngram": Mean()}
        self._forward_s, self._wait_s = Mean(), Mean()
        self._since = 0

    def served(self, source: Source, tokens: int, forward_s: float) -> None:
        """A round over candidates of this source brought so many tokens."""
        self._tokens[source].add(tokens, 1.0)
        self._forward_s.add(forward_s, 1.0)
        self._since += 1

    def waited(self, seconds: float) -> None:
        self._wait_s.add(seconds, 1.0)

    @property
    def ngram(self) -> bool:
        """Whether rows that find an n-gram take it. Decided before each round; the first ones try both."""
        rates = {source: self._rate(source) for source in self._tokens}
        if rates["ngram"] is None or rates["jit"] is None:
            return rates["ngram"] is None
        better = rates["ngram"] > rates["jit"]
        return better if self._since % TRY_EVERY else not better

    def _rate(self, source: Source) -> float | None:
        tokens, forward_s = self._tokens[source].value, self._forward_s.value
        if tokens is None or not forward_s:
            return None
        return tokens / (forward_s + (self._wait_s.value or 0.0 if source == "jit" else 0.0))
