"""The draft's lane from the verifier, with the bell kept apart."""

from __future__ import annotations

from collections import deque

from .lanes import ControlLane
from .links.base import Link
from .messages import Bell, Message


class Inbox:
    """Receives the verifier's messages in order, except bells, which only ``rung`` sees.

    Args:
        link: if it can tell that the outcome frame has arrived, that is the bell.
    """

    def __init__(self, lane: ControlLane, link: Link):
        self._lane, self._link = lane, link
        self._early: deque[Message] = deque()
        self._rung = -1

    def receive(self, timeout_s: float) -> Message | None:
        """Returns the next message, or None if none comes in time."""
        if self._early:
            return self._early.popleft()
        while isinstance(message := self._lane.receive(timeout_s), Bell):
            self._rung = message.round
        return message

    def rung(self, round: int) -> bool:
        """Returns whether the verifier waits for this round's tree. Does not wait; costs a few microseconds."""
        if (arrived := self._link.arrived) is not None:
            return arrived
        while self._rung != round and (message := self._lane.receive(0)) is not None:
            if isinstance(message, Bell):
                self._rung = message.round
            else:
                self._early.append(message)
        return self._rung == round
