"""Where the time of a round goes."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

KEPT_ROUNDS = 4096
"""Rounds whose durations are kept for medians."""


class StopWatch:
    """Measures consecutive parts of a round with one clock reading each."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self.began_s = self._last_s = clock()

    def lap(self) -> float:
        """Seconds since the last call, or since the start."""
        before, self._last_s = self._last_s, self._clock()
        return self._last_s - before

    @property
    def elapsed_s(self) -> float:
        """From the start to the last lap."""
        return self._last_s - self.began_s

    @property
    def now_s(self) -> float:
        """The clock at the last lap."""
        return self._last_s


@dataclass(kw_only=True, slots=True)
class RoundTimes:
    """Seconds of one round. The loop writes each part when it is over."""

    forward_s: float = 0.0
    """The verification."""
    draft_s: float | None = None
    """The draft's own time for this round's candidates; None if nothing was drafted."""
    exchange_s: float | None = None
    """From posting the outcomes to having the speculation set; None if no draft took part."""
    waited_s: float = 0.0
    """Blocked, waiting for the draft."""
    jit_s: float | None = None
    """Waiting for candidates drafted after a miss; None if no row waited."""


class TimeHistory:
    """Durations of recent rounds."""

    def __init__(self) -> None:
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT_ROUNDS))

    def add(self, times: RoundTimes, *, round_s: float | None, all_hit: bool) -> None:
        """Keep a round.

        Args:
            round_s: from the end of the round before to the end of this one; None if something else, such as a
                prefill, came between.
            all_hit: whether every speculating row found its candidates prepared.
        """
        self._seconds["forward"].append(times.forward_s)
        if times.draft_s is not None:
            self._seconds["draft"].append(times.draft_s)
        if round_s is not None:
            self._seconds["round"].append(round_s)
            if all_hit:
                self._seconds["hit_round"].append(round_s)

    def medians_ms(self, *, reset: bool) -> dict[str, float | None]:
        """Median milliseconds of ``round``, ``hit_round``, ``forward`` and ``draft``; None where nothing was timed.
        ``reset``: forget everything afterwards."""
        names = ("round", "hit_round", "forward", "draft")
        medians = {
            f"{name}_ms": statistics.median(self._seconds[name]) * 1e3 if self._seconds[name] else None
            for name in names
        }
        if reset:
            self._seconds.clear()
        return medians
