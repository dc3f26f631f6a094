"""A draft that is lost, and when it is started again. Decisions only: fronts act on them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

STEADY_S = 600.0
"""A draft that was there for so long has made up for the restarts before."""

log = logging.getLogger(__name__)

News = Literal["lost", "restarting", "back", "given_up"]
State = Literal["there", "lost", "starting", "given_up"]


class DraftRestarts:
    """The draft of a pipeline: there, lost, being started again (each try under an epoch of its own), or
    given up.

    Args:
        limit: tries in a row. delay_s: before the first of them; each further one waits twice as long.
        start_s: how long a try may take.
    """

    def __init__(self, *, limit: int, delay_s: float, start_s: float, clock: Callable[[], float] = time.monotonic):
        self.limit = limit
        self.state: State = "there"
        self.epoch = self.tries = 0
        self.tell: Callable[[News], None] = lambda _news: None
        """Is told what happens."""
        self._delay_s, self._start_s, self._clock = delay_s, start_s, clock
        self._why, self._since, self._until = "", clock(), 0.0

    @property
    def degraded(self) -> str | None:
        """Why the draft is not there, and what is done about it; None if it is."""
        if self.state == "there":
            return None
        if self.state == "given_up":
            return f"{self._why} (not restarted again: engine.draft_restarts={self.limit})" if self.tries else self._why
        number = self.tries + (self.state == "lost")
        return f"{self._why} (restart {number} of {self.limit} is under way)"

    @property
    def pending(self) -> bool:
        """Lost, and not given up."""
        return self.state in ("lost", "starting")

    def lost(self, why: str, epoch: int | None = None) -> None:
        """The draft died, or did not come back. ``epoch``: whose loss this is, where others may be meant."""
        if self.state in ("lost", "given_up") or epoch not in (None, self.epoch):
            if epoch is None:  # the verifier only saw the link break; the draft itself knows why
                log.warning("of the draft that was lost: %s", why)
            return
        now, self._why = self._clock(), why
        if self.state == "there" and now - self._since >= STEADY_S:
            self.tries = 0
        first, *_ = why.splitlines() or [""]
        if self.tries >= self.limit:
            self._change("given_up", "the draft is lost, decoding goes on plainly: %s", first)
            return
        delay_s = self._delay_s * 2**self.tries
        self._until = now + delay_s
        self._change("lost", "the draft is lost, restarting it in %g s: %s", delay_s, first)

    def due(self) -> bool:
        """Whether to start it now; it counts as begun then."""
        if self.state == "starting" and self._clock() >= self._until:
            self.lost(f"the draft was not ready in {self._start_s:g} s (engine.start_timeout_s)")
        if self.state != "lost" or self._clock() < self._until:
            return False
        self.tries += 1
        self.epoch += 1
        self._until = self._clock() + self._start_s
        self._change("starting", "restarting the draft (%d of %d)", self.tries, self.limit)
        return True

    def back(self, epoch: int) -> None:
        """The draft of this epoch takes part again."""
        if self.state == "starting" and epoch == self.epoch:
            self._since = self._clock()
            self._change("there", "the draft is back (restart %d of %d)", self.tries, self.limit)

    def _change(self, state: State, text: str, *values: object) -> None:
        self.state = state
        log.warning(text, *values)
        news: dict[State, News] = {"there": "back", "lost": "lost", "starting": "restarting", "given_up": "given_up"}
        self.tell(news[state])
