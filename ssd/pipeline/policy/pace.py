"""Whether one row of a batch is drafted for. The other rows wait for its misses."""

from __future__ import annotations

from ...decoding.averages import DecayingRatio
from .governor import LONGEST_REST, MARGIN, MEMORY, REST, TRIAL


class Pace:
    """What drafting brings one sequence, and what it costs its batch.

    By the renewal-reward rule, a row is worth drafting for if and only if it gains more tokens per round than its
    batch would have decoded in the time that drafting for it costs. That time is the wait after its misses, in rounds
    in which no other row missed.
    """

    def __init__(self) -> None:
        self.drafted = True
        """Whether the row is drafted for while its batch speculates."""
        self._tokens, self._misses = DecayingRatio(MEMORY), DecayingRatio(MEMORY)
        self._left = MEMORY  # rounds until the next decision
        self._rest, self._trial = REST, True

    @property
    def misses(self) -> float:
        """Share of its rounds after which candidates had to be drafted for it."""
        return self._misses.value or 0.0

    def observe(self, *, tokens: int, missed: bool, others_hit: float, wait_s: float, batch_rate: float) -> None:
        """Take in a round.

        Args:
            tokens: of the row.
            missed: whether the row then waited for candidates.
            others_hit: probability that no other row waits.
            wait_s: how long such a wait takes.
            batch_rate: tokens per second of all rows together.
        """
        if self.drafted:
            self._tokens.observe(tokens, 1.0)
            self._misses.observe(float(missed), 1.0)
        self._left -= 1
        if self._left > 0:
            return
        if not self.drafted:
            self.drafted = self._trial = True
            self._tokens, self._misses, self._left = DecayingRatio(MEMORY), DecayingRatio(MEMORY), TRIAL
            return
        gained = (self._tokens.value or 1.0) - 1.0
        costs = self.misses * others_hit * wait_s * batch_rate
        if gained < costs * (1 + MARGIN if self._trial else 1 - MARGIN):
            self.drafted = False
            self._left, self._rest = self._rest, min(2 * self._rest, LONGEST_REST)
        else:
            self._left, self._rest, self._trial = 1, REST, False
