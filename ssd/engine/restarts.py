"""Decides when a lost draft is started again. Decisions only: the fronts act on them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

STEADY_S = 600.0
"""A draft that stayed this long resets the count of restarts."""

log = logging.getLogger(__name__)

News = Literal["lost", "restarting", "back", "given_up"]
State = Literal["there", "lost", "starting", "given_up"]
NEWS: dict[State, News] = {"there": "back", "lost": "lost", "starting": "restarting", "given_up": "given_up"}


def ignore(_news: News) -> None:
    """Tells nobody."""


class DraftRestarts:
    """State of a pipeline's draft: there, lost, being started again, or given up. Each try has its own epoch.

    Args:
        limit: Most tries in a row.
        delay_s: Wait before the first try. Each further one waits twice as long.
        start_s: Most time a try may take.
        tell: Called with every change.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self,
        *,
        limit: int,
        delay_s: float,
        start_s: float,
        tell: Callable[[News], None] = ignore,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.state: State = "there"
        self.epoch = self.tries = 0
        self._limit, self._delay_s, self._start_s, self._tell, self._clock = limit, delay_s, start_s, tell, clock
        self._why, self._since, self._until = "", clock(), 0.0

    @property
    def degraded(self) -> str | None:
        """Why the draft is missing, and what is being done; None if it is there."""
        if self.state == "there":
            return None
        if self.state == "given_up":
            return (
                f"{self._why} (not restarted again: engine.draft_restarts={self._limit})" if self.tries else self._why
            )
        number = self.tries + (self.state == "lost")
        return f"{self._why} (restart {number} of {self._limit} is under way)"

    @property
    def pending(self) -> bool:
        """The draft is lost and not given up."""
        return self.state in ("lost", "starting")

    def forbid(self) -> None:
        """Allows no restarts: the launcher cannot start a worker again."""
        self._limit = 0

    def lost(self, why: str, epoch: int | None = None) -> None:
        """Takes in that the draft died or did not come back.

        Args:
            why: One or more lines.
            epoch: Which draft, if the message may be about an earlier one.
        """
        if self.state in ("lost", "given_up") or epoch not in (None, self.epoch):
            if epoch is None:  # the verifier only saw the link break; the draft itself knows the reason
                log.warning("the lost draft reports: %s", why)
            return
        now, self._why = self._clock(), why
        if self.state == "there" and now - self._since >= STEADY_S:
            self.tries = 0
        first, *_ = why.splitlines() or [""]
        if self.tries >= self._limit:
            self._change("given_up", "the draft is lost, decoding goes on without it: %s", first)
            return
        delay_s = self._delay_s * 2**self.tries
        self._until = now + delay_s
        self._change("lost", "the draft is lost, restarting it in %g s: %s", delay_s, first)

    def due(self) -> bool:
        """Returns whether to start the draft now. True counts as begun."""
        if self.state == "starting" and self._clock() >= self._until:
            self.lost(f"the draft was not ready in {self._start_s:g} s (engine.start_timeout_s)")
        if self.state != "lost" or self._clock() < self._until:
            return False
        self.tries += 1
        self.epoch += 1
        self._until = self._clock() + self._start_s
        self._change("starting", "restarting the draft (%d of %d)", self.tries, self._limit)
        return True

    def back(self, epoch: int) -> None:
        """Takes in that the draft of this epoch takes part again."""
        if self.state == "starting" and epoch == self.epoch:
            self._since = self._clock()
            self._change("there", "the draft is back (restart %d of %d)", self.tries, self._limit)

    def _change(self, state: State, text: str, *values: object) -> None:
        self.state = state
        log.warning(text, *values)
        self._tell(NEWS[state])
