"""Candidates from the sequence itself: what followed the last time its end was seen.

Costs no model and, being a function of tokens both sides of a pipeline know, no message. As a draft it
is a point mass: exact under every verification rule. Source: prompt lookup decoding (Saxena 2023),
as ``ngram`` in vLLM; Yang et al. 2023, arXiv 2304.04487.
"""

from __future__ import annotations

from collections.abc import Iterable

LONGEST, SHORTEST = 4, 2
"""Lengths of the endings looked up; the longest that was seen before counts."""


class NgramIndex:
    """Of one sequence: where each n-gram of it last ended. Every token costs ``LONGEST - SHORTEST + 1``
    dictionary entries."""

    def __init__(self, tokens: Iterable[int] = ()):
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """The sequence goes on with ``tokens``."""
        known = self._tokens
        for token in tokens:
            # An ending is entered once something follows it: the sequence's own end is not a find.
            for length in range(SHORTEST, min(LONGEST, len(known)) + 1):
                self._after[tuple(known[-length:])] = len(known)
            known.append(token)

    def propose(self, count: int) -> list[int]:
        """``count`` tokens that may come next; empty if the end was never seen before."""
        known = self._tokens
        for length in range(min(LONGEST, len(known)), SHORTEST - 1, -1):
            start = self._after.get(tuple(known[-length:]))
            if start is not None:
                found = known[start : start + count]
                while len(found) < count:  # the text repeats itself up to its end
                    found.append(found[len(found) - (len(known) - start)])
                return found
        return []


class NgramRounds:
    """Rounds of n-grams on a text, played along as it comes: what they would have brought is known
    without running any.

    Args: index: of the text so far, extended here. count: candidates of a round.
    """

    def __init__(self, index: NgramIndex, count: int):
        self.index, self._count = index, count
        self._expected = index.propose(count)

    def extend(self, tokens: Iterable[int]) -> int:
        """The text goes on with ``tokens``. Returns how many rounds ended within them."""
        rounds = 0
        for token in tokens:
            self.index.extend((token,))
            if self._expected and self._expected[0] == token:
                self._expected = self._expected[1:]
            else:  # the bonus token of the round
                rounds += 1
                self._expected = self.index.propose(self._count)
        return rounds
