"""What a missed row verifies next: a draft on demand, which takes time, or an n-gram, which takes none."""

from __future__ import annotations

from typing import Literal

from ...decoding.averages import DecayingRatio
from .governor import MEMORY

Source = Literal["jit", "ngram"]
TRY_EVERY = 16
"""Number of misses after which the other source is tried once."""


class FallbackChoice:
    """Compares the two sources by tokens per second: the tokens of the round that they serve over its forward, plus
    the wait for a draft on demand."""

    def __init__(self) -> None:
        self._tokens: dict[Source, DecayingRatio] = {"jit": DecayingRatio(MEMORY), "ngram": DecayingRatio(MEMORY)}
        self._forward_s, self._wait_s = DecayingRatio(MEMORY), DecayingRatio(MEMORY)
        self._since = 0

    def served(self, source: Source, tokens: int, forward_s: float) -> None:
        """Take in a round over candidates of this source, and its tokens."""
        self._tokens[source].observe(tokens, 1.0)
        self._forward_s.observe(forward_s, 1.0)
        self._since += 1

    def waited(self, seconds: float) -> None:
        """Take in a wait for a draft on demand."""
        self._wait_s.observe(seconds, 1.0)

    @property
    def ngram(self) -> bool:
        """Whether rows that find an n-gram take it. The first rounds try both sources."""
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
