"""Candidates from the sequence itself: the tokens that followed when its last n-gram occurred before.

They need no model, and no message: both sides of a pipeline know the tokens they are computed from. As a draft
they are a point mass, which is exact under every verification rule. Source: prompt lookup decoding (Saxena 2023),
``ngram`` in vLLM; Yang et al. 2023, arXiv 2304.04487.
"""

from __future__ import annotations

from collections.abc import Iterable

LONGEST, SHORTEST = 4, 2
"""Lengths of the n-grams that are looked up; the longest one found is used."""


class NgramIndex:
    """Where each n-gram of one sequence last ended. Every token adds ``LONGEST - SHORTEST + 1``
    dictionary entries."""

    def __init__(self, tokens: Iterable[int] = ()):
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends ``tokens`` to the sequence."""
        known = self._tokens
        for token in tokens:
            # An n-gram is entered once a token follows it, so that the sequence's end does not find itself.
            for length in range(SHORTEST, min(LONGEST, len(known)) + 1):
                self._after[tuple(known[-length:])] = len(known)
            known.append(token)

    def propose(self, count: int) -> list[int]:
        """Returns ``count`` tokens that may come next; none if the sequence's end did not occur before."""
        known = self._tokens
        for length in range(min(LONGEST, len(known)), SHORTEST - 1, -1):
            start = self._after.get(tuple(known[-length:]))
            if start is not None:
                found = known[start : start + count]
                while len(found) < count:  # the repetition reaches the end of the text
                    found.append(found[len(found) - (len(known) - start)])
                return found
        return []


class NgramRounds:
    """Simulates rounds with n-gram candidates on a growing text, so that their gain is known without running any.

    Args:
        index: of the text so far; extended here.
        count: candidates of a round.
    """

    def __init__(self, index: NgramIndex, count: int):
        self.index, self._count = index, count
        self._expected = index.propose(count)

    def extend(self, tokens: Iterable[int]) -> int:
        """Appends ``tokens`` to the text; returns the number of rounds that ended within them."""
        rounds = 0
        for token in tokens:
            self.index.extend((token,))
            if self._expected and self._expected[0] == token:
                self._expected = self._expected[1:]
            else:  # the bonus token of the round
                rounds += 1
                self._expected = self.index.propose(self._count)
        return rounds
