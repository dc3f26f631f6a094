"""The verifier's lane to its front, which holds back messages for a moment so that they travel together."""

from __future__ import annotations

from collections.abc import Callable

from .lanes import ControlLane
from .messages import Message

TELL_S = 0.02
"""Longest time that a message is held back. Nobody reads faster, and waking the front takes time from a short round
where worker and front share a core."""


class FrontLane:
    """A control lane on which messages that nobody waits for may travel with later ones. Their order is kept.

    Args:
        clock: monotonic time in seconds.
    """

    def __init__(self, lane: ControlLane, clock: Callable[[], float]):
        self._lane, self._clock = lane, clock
        self._held: list[Message] = []
        self._told_s = -TELL_S

    def tell(self, messages: list[Message], *, at_once: bool) -> None:
        """Sends messages, or holds them back until ``TELL_S`` after the last that were sent.

        Args:
            at_once: somebody waits for one of them: a first token, or an end.

        Raises:
            PipelineError: nobody is at the other end.
        """
        self._held += messages
        now = self._clock()
        if self._held and (at_once or now - self._told_s >= TELL_S):
            self._told_s = now
            self._flush()

    def send(self, message: Message) -> None:
        """Sends a message, and before it those held back. Raises: PipelineError: nobody is at the other end."""
        self._flush()
        self._lane.send(message)

    def receive(self, timeout_s: float) -> Message | None:
        """As ``ControlLane.receive``."""
        return self._lane.receive(timeout_s)

    def _flush(self) -> None:
        held, self._held = self._held, []
        for number, message in enumerate(held, start=1):
            self._lane.send(message, more=number < len(held))
