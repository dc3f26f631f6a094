"""The workers' ends of their control lanes: what the draft hears, and when the verifier's front is told."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .lanes import ControlLane
from .links.base import Link
from .messages import Bell, Message

TELL_S = 0.02
"""What became certain is told this often: faster than anybody reads, and waking the front takes a share of a short
round from the worker it shares a core with."""


class Inbox:
    """What the verifier tells the draft, with its bell kept apart.

    Args: link: in some links the outcome frame, which is there once the forward is done, is the bell.
    """

    def __init__(self, lane: ControlLane, link: Link):
        self._lane, self._link = lane, link
        self._early: deque[Message] = deque()
        self._rung = -1

    def receive(self, timeout_s: float) -> Message | None:
        """The next message that is no bell, or None if none comes in time."""
        if self._early:
            return self._early.popleft()
        while isinstance(message := self._lane.receive(timeout_s), Bell):
            self._rung = message.round
        return message

    def rung(self, round: int) -> bool:
        """Whether the verifier waits for this round's tree."""
        if (arrived := self._link.arrived) is not None:
            return arrived
        while self._rung != round and (message := self._lane.receive(0)) is not None:
            if isinstance(message, Bell):
                self._rung = message.round
            else:
                self._early.append(message)
        return self._rung == round


class Teller:
    """The lane to the front, in which what became certain may wait a little for more of it.

    Order is kept: whatever else is sent goes behind it.
    """

    def __init__(self, lane: ControlLane, clock: Callable[[], float]):
        self._lane, self._clock = lane, clock
        self._held: list[Message] = []
        self._told_s = -TELL_S

    def tell(self, messages: list[Message], *, at_once: bool) -> None:
        """``at_once``: somebody waits for one of them, a first token or an end."""
        self._held += messages
        now = self._clock()
        if self._held and (at_once or now - self._told_s >= TELL_S):
            self._told_s = now
            self._flush()

    def send(self, message: Message) -> None:
        self._flush()
        self._lane.send(message)

    def receive(self, timeout_s: float) -> Message | None:
        return self._lane.receive(timeout_s)

    def _flush(self) -> None:
        held, self._held = self._held, []
        for number, message in enumerate(held, start=1):
            self._lane.send(message, more=number < len(held))
