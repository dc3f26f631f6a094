"""The governor: does speculation pay now, and if not, when to try again.

A speculative round brings ``tokens`` for ``rows`` sequences in ``seconds``; plainly the same rows
would bring one token each in less time. What a plain round takes is known without decoding one:
it is a speculative round less the waits for the draft (and, with ``numerics: fast``, less what
the wider forward costs). While plain rounds run they are measured themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

MARGIN = 0.02
"""Hysteresis: speculation stops below a gain of 1 - MARGIN and stays after a trial above 1 + MARGIN."""
MEMORY = 24
"""Rounds after which an observation has lost 1 - 1/e of its weight."""
TRIAL = 8
"""Rounds of a trial: enough to tell twice the speed from half of it, too few to cost much."""
REST, LONGEST_REST = 64, 4096
"""Plain rounds before the first trial; each failed trial doubles them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What a round brought."""

    tokens: int
    """Over all rows."""
    rows: int
    seconds: float
    waited_s: float = 0.0
    """Of those, waiting for the draft."""


class Mean:
    """Ratio of exponentially decaying sums."""

    def __init__(self) -> None:
        self.top = self.bottom = 0.0

    def add(self, top: float, bottom: float) -> None:
        keep = 1 - 1 / MEMORY
        self.top, self.bottom = self.top * keep + top, self.bottom * keep + bottom

    @property
    def value(self) -> float | None:
        return self.top / self.bottom if self.bottom else None


class Governor:
    """Decides between rounds with the draft and plain ones.

    Args:
        saving_s: how much shorter a plain round's forward is than a speculative one's (0 with
            ``numerics: strict``, which pads plain rounds to the same width).
    """

    def __init__(self, *, saving_s: float = 0.0):
        self.speculating = True
        self._saving_s = saving_s
        self._rate, self._plain_s = Mean(), Mean()
        self._left, self._rest = MEMORY, REST  # rounds until the next decision
        self._trial = True

    @property
    def gain(self) -> float | None:
        """Tokens per second of the last speculative rounds over those of plain ones; None before
        there were any."""
        rate, plain_s = self._rate.value, self._plain_s.value
        return None if rate is None or plain_s is None else rate * plain_s

    def observe(self, round: Round) -> None:
        """Take in a round that ran as ``speculating`` said."""
        if self.speculating:
            self._rate.add(round.tokens / round.rows, round.seconds)
            self._plain_s.add(max(round.seconds - round.waited_s - self._saving_s, 0.0), 1.0)
        else:
            self._plain_s.add(round.seconds, 1.0)
        self._left -= 1
        if self._left > 0:
            return
        if not self.speculating:
            self.speculating = self._trial = True
            self._left, self._rate = TRIAL, Mean()
            return
        gain = self.gain
        assert gain is not None
        if gain < (1 + MARGIN if self._trial else 1 - MARGIN):
            self.speculating = False
            self._left, self._rest = self._rest, min(2 * self._rest, LONGEST_REST)
        else:
            self._trial = False
            self._left, self._rest = 1, REST
