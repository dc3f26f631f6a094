"""The governor: which way of decoding is fastest now, and when to try another.

The ways are arms: ``ssd``, ``sd``, ``ngram`` (candidates from the text itself, no draft) and ``none``. The speed of
most arms is known without trying them:

* A plain round takes as long as a drafted one without its waits, with a forward of fewer rows.
* A round of n-grams takes as long as a verification. What it would accept is counted on the text as it comes
  (``decoding.text.ngram.NgramRounds``).
* ``sd`` accepts what ``ssd`` accepts, and waits in every round as ``ssd`` waits after a miss.

What a draft brings is unknown while nothing is drafted, so it is tried for a few rounds, less and less often. Plain
decoding is tried too where it might be faster, because the length of its forward depends on the rest of the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...decoding.averages import DecayingRatio
from ..round.roles import Arm

ARMS: tuple[Arm, ...] = ("ssd", "sd", "ngram", "none")

MARGIN = 0.02
"""Hysteresis: an arm is left for one that is faster by this share, and kept after a trial if it is faster by it."""
MEMORY = 24
"""Rounds after which an observation has lost 1 - 1/e of its weight."""
NGRAM_MEMORY = 192
"""The same, for what n-grams would have brought."""
TRIAL = 8
"""Rounds of a trial: enough to tell twice the speed from half of it, and too few to cost much."""
REST, LONGEST_REST = 64, 4096
"""Rounds before the first trial; each failed trial doubles them."""
NEAR = 0.6
"""Plain decoding is tried only where its expected rate is at least this share of the current arm's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundResult:
    """What a round brought and took."""

    tokens: int
    """Sum over all rows."""
    rows: int
    seconds: float
    waited_s: float = 0.0
    """The part of ``seconds`` spent waiting for the draft."""
    missed_s: float = 0.0
    """The part of ``waited_s`` spent waiting for candidates drafted after misses."""
    forward_s: float = 0.0
    """The part of ``seconds`` spent in the forward."""
    wide: bool = True
    """Whether there were candidates to verify."""


class Governor:
    """Decides among the arms of a method, for all its requests together.

    Args:
        method: the first arm; the ones after it in ``ARMS`` are the others.
        ngram_tokens: tokens per row and round of n-grams; shared where several governors see the same text.
    """

    def __init__(self, method: Arm = "ssd", *, ngram_tokens: DecayingRatio | None = None):
        self.arm: Arm = method
        self.method: Arm = method
        self.share = 1.0
        """A plain round's forward as a share of a verification's; 1 where it is padded to the same width."""
        self._rest_s, self._verify_s = DecayingRatio(MEMORY), DecayingRatio(MEMORY)
        self._missed_s, self._ngram_tokens = DecayingRatio(MEMORY), ngram_tokens or DecayingRatio(NGRAM_MEMORY)
        self._tokens, self._rate = DecayingRatio(MEMORY), DecayingRatio(MEMORY)
        self._trial: int | None = None
        """Rounds left of a trial. 0: the arm is settled. None: nothing was observed yet."""
        self._left = self._rest = REST
        self._until_look, self._looked_from = REST, 0.0
        """Rounds until plain decoding is tried, and while it is tried, the rate of the arm before."""
        self._wide, self._alike, self._forward_s, self._other_s = True, 0, DecayingRatio(MEMORY), None

    @property
    def speculating(self) -> bool:
        """Whether the draft takes part."""
        return self.arm in ("ssd", "sd")

    @property
    def undrafted(self) -> Arm:
        """The faster of the arms that need no draft."""
        rates = self.rates()
        return "ngram" if rates and rates["ngram"] > rates["none"] * (1 + MARGIN) else "none"

    @property
    def missed_s(self) -> float:
        """Seconds that rows wait for candidates after a miss; 0 before any did."""
        return self._missed_s.value or 0.0

    @property
    def gain(self) -> float | None:
        """Speedup over plain rounds; None while it is unknown."""
        rates = self.rates()
        return rates[self.arm] / rates["none"] if self.arm in rates else None

    def count_ngrams(self, tokens: int, rounds: int) -> None:
        """Take in how many rounds of n-grams a row would have needed for these tokens."""
        self._ngram_tokens.observe(tokens, rounds)

    def rates(self) -> dict[Arm, float]:
        """Tokens per second of a row, for every arm of which something is known."""
        rest_s, verify_s = self._rest_s.value, self._verify_s.value
        if rest_s is None or verify_s is None:
            return {}
        round_s, plain_s = rest_s + verify_s, rest_s + verify_s * self.share
        rates: dict[Arm, float] = {"none": 1 / plain_s, "ngram": (self._ngram_tokens.value or 1.0) / round_s}
        tokens, rate, missed_s = self._tokens.value, self._rate.value, self._missed_s.value
        if self.arm == "ssd" and tokens and missed_s:
            rates["sd"] = tokens / (round_s + missed_s)
        if self.speculating and rate:
            rates[self.arm] = rate
        return rates

    def observe(self, round: RoundResult) -> None:
        """Take in a round that ran by ``arm``."""
        if self._trial is None:  # each row of a batch is an observation
            self._trial = max(TRIAL, MEMORY // round.rows)
        wide = round.wide and self.arm != "none"
        self._compare_widths(round.forward_s, wide)
        self._verify_s.observe(round.forward_s / (1.0 if wide else self.share), 1.0)
        self._rest_s.observe(max(round.seconds - round.waited_s - round.forward_s, 0.0), 1.0)
        if self.speculating:
            self._rate.observe(round.tokens / round.rows, round.seconds)
            self._tokens.observe(round.tokens / round.rows, 1.0)
            if round.missed_s:
                self._missed_s.observe(round.missed_s, 1.0)
        rates = self.rates()
        others: dict[Arm, float] = {arm: rate for arm, rate in rates.items() if arm != self.arm}
        if self._looked_from:
            others[self.method] = self._looked_from
        best: Arm = max(others, key=lambda arm: others[arm])
        if self._trial > 1:
            self._trial -= 1
        elif rates[self.arm] < others[best] * (1 + MARGIN if self._trial else 1 - MARGIN):
            self._leave(best)
        else:
            self._stay(rates)

    def _compare_widths(self, forward_s: float, wide: bool) -> None:
        """Measure ``share`` again where wide rounds follow narrow ones, or the other way round."""
        if wide != self._wide:
            known = self._forward_s.value if self._alike >= TRIAL else None
            self._wide, self._alike, self._forward_s, self._other_s = wide, 0, DecayingRatio(MEMORY), known
        self._forward_s.observe(forward_s, 1.0)
        self._alike += 1
        if self._alike == TRIAL and self._other_s and (here := self._forward_s.value):
            self.share = min(1.0, self._other_s / here if wide else here / self._other_s)

    def _stay(self, rates: dict[Arm, float]) -> None:
        """Keep the arm: it is the best that is known."""
        if self._looked_from:  # plain decoding is faster than the method's rounds suggested
            self._looked_from = 0.0
            self._rest_longer()
        elif self._trial and self.arm == self.method:
            self._left = self._rest = REST
        self._trial = 0
        if self.arm != self.method:
            self._left -= 1
            if not self._left:
                self._try(self.method)
        elif self.share < 1.0:
            self._until_look -= 1
            if self._until_look <= 0 and rates["none"] > NEAR * rates[self.arm]:
                self._until_look, self._looked_from = LONGEST_REST, rates[self.arm]
                self.arm, self._trial = "none", TRIAL

    def _leave(self, best: Arm) -> None:
        looked, self._looked_from = self._looked_from, 0.0
        if looked and best == self.method:  # back to what was before
            self.arm, self._trial = best, 0
            return
        if looked or self.arm == self.method:
            self._rest_longer()
        if best == "sd":
            self._try(best)
        else:
            self.arm, self._trial = best, 0

    def _rest_longer(self) -> None:
        self._left, self._rest = self._rest, min(2 * self._rest, LONGEST_REST)

    def _try(self, arm: Arm) -> None:
        self.arm, self._trial = arm, TRIAL
        self._tokens, self._rate = DecayingRatio(MEMORY), DecayingRatio(MEMORY)
