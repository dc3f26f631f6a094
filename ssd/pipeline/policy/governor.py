"""The governor: which way of decoding is fastest now, and when to try another.

The ways are arms: ``ssd``, ``sd``, ``ngram`` (candidates from the text itself, no draft), ``none``. Most of
what they would bring is known without trying. A plain round is a drafted one less the waits for the
draft, its forward as much shorter as one of fewer rows is. A round of n-grams takes as long as
a verification and accepts what the text tells (``decoding.ngram.NgramRounds``). ``sd`` accepts what ``ssd`` does
and waits in every round as ``ssd`` waits after a miss. Only what a draft brings while nothing is drafted
must be tried: for a few rounds, ever more rarely. So is plain decoding where it might be the better one: how much
shorter its forward is depends on what else the machine does.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..round.roles import Arm

ARMS: tuple[Arm, ...] = ("ssd", "sd", "ngram", "none")

MARGIN = 0.02
"""Hysteresis: an arm is left for one that brings so much more, and kept after a trial if it brings so much more."""
MEMORY = 24
"""Rounds after which an observation has lost 1 - 1/e of its weight."""
NAMED_MEMORY = 192
"""The same, of what n-grams would have brought."""
TRIAL = 8
"""Rounds of a trial: enough to tell twice the speed from half of it, too few to cost much."""
REST, LONGEST_REST = 64, 4096
"""Rounds before the first trial; each failed trial doubles them."""
NEAR = 0.6
"""Plain decoding is tried only where it seems to bring so much of what the arm brings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What a round brought."""

    tokens: int
    """Over all rows."""
    rows: int
    seconds: float
    waited_s: float = 0.0
    """Of those, waiting for the draft."""
    missed_s: float = 0.0
    """Of those, for trees drafted after misses."""
    forward_s: float = 0.0
    """Of ``seconds``, the forward."""
    wide: bool = True
    """Whether there were candidates to verify."""


class Mean:
    """Ratio of exponentially decaying sums."""

    def __init__(self, memory: int | None = None) -> None:
        self._keep = 1 - 1 / (memory or MEMORY)
        self.top = self.bottom = 0.0

    def add(self, top: float, bottom: float) -> None:
        self.top, self.bottom = self.top * self._keep + top, self.bottom * self._keep + bottom

    @property
    def value(self) -> float | None:
        return self.top / self.bottom if self.bottom else None


class Governor:
    """Decides among the arms of a method, for all its requests together.

    Args:
        method: the first arm; those after it in ``ARMS`` are the others.
        named: tokens of a round of n-grams; given where several governors see the same text.
    """

    def __init__(self, method: Arm = "ssd", *, named: Mean | None = None):
        self.arm: Arm = method
        self.method: Arm = method
        self.share = 1.0
        """Of a verification's forward, what a plain round's takes (1 where it is padded to the same width)."""
        self._rest_s, self._verify_s = Mean(), Mean()
        self._missed_s, self._named = Mean(), named or Mean(NAMED_MEMORY)
        self._tokens, self._rate = Mean(), Mean()
        self._trial: int | None = None
        """Rounds left of a trial; 0: the arm is settled. None: nothing was seen yet."""
        self._left = self._rest = REST
        self._until_look, self._looked_from = REST, 0.0
        """Rounds until plain decoding is tried; while it is, what the arm before brought."""
        self._wide, self._alike, self._forward_s, self._other_s = True, 0, Mean(), None

    @property
    def speculating(self) -> bool:
        """Whether the draft takes part."""
        return self.arm in ("ssd", "sd")

    @property
    def undrafted(self) -> Arm:
        """The better of those that need no draft."""
        rates = self.rates()
        return "ngram" if rates and rates["ngram"] > rates["none"] * (1 + MARGIN) else "none"

    @property
    def missed_s(self) -> float:
        """How long rows that missed wait for a tree; 0 before any did."""
        return self._missed_s.value or 0.0

    @property
    def gain(self) -> float | None:
        """Tokens per second over those of plain rounds; None before there were any."""
        rates = self.rates()
        return rates[self.arm] / rates["none"] if self.arm in rates else None

    def named(self, tokens: int, rounds: int) -> None:
        """So many rounds of n-grams would have brought a row so many tokens."""
        self._named.add(tokens, rounds)

    def rates(self) -> dict[Arm, float]:
        """Tokens per second of a row, by every arm of which something is known now."""
        rest_s, verify_s = self._rest_s.value, self._verify_s.value
        if rest_s is None or verify_s is None:
            return {}
        round_s, plain_s = rest_s + verify_s, rest_s + verify_s * self.share
        rates: dict[Arm, float] = {"none": 1 / plain_s, "ngram": (self._named.value or 1.0) / round_s}
        tokens, rate, missed_s = self._tokens.value, self._rate.value, self._missed_s.value
        if self.arm == "ssd" and tokens and missed_s:
            rates["sd"] = tokens / (round_s + missed_s)
        if self.speculating and rate:
            rates[self.arm] = rate
        return rates

    def observe(self, round: Round) -> None:
        """Take in a round that ran as ``arm`` said."""
        if self._trial is None:  # rows of a batch are as many observations
            self._trial = max(TRIAL, MEMORY // round.rows)
        wide = round.wide and self.arm != "none"
        self._compare_widths(round.forward_s, wide)
        self._verify_s.add(round.forward_s / (1.0 if wide else self.share), 1.0)
        self._rest_s.add(max(round.seconds - round.waited_s - round.forward_s, 0.0), 1.0)
        if self.speculating:
            self._rate.add(round.tokens / round.rows, round.seconds)
            self._tokens.add(round.tokens / round.rows, 1.0)
            if round.missed_s:
                self._missed_s.add(round.missed_s, 1.0)
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
        """Measure ``share`` anew where wide rounds follow narrow ones, or the other way round."""
        if wide != self._wide:
            known = self._forward_s.value if self._alike >= TRIAL else None
            self._wide, self._alike, self._forward_s, self._other_s = wide, 0, Mean(), known
        self._forward_s.add(forward_s, 1.0)
        self._alike += 1
        if self._alike == TRIAL and self._other_s and (here := self._forward_s.value):
            self.share = min(1.0, self._other_s / here if wide else here / self._other_s)

    def _stay(self, rates: dict[Arm, float]) -> None:
        """The arm is the best that is known."""
        if self._looked_from:  # plain decoding is better than the method seemed to say
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
        if looked and best == self.method:  # as it was
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
        self._tokens, self._rate = Mean(), Mean()
