"""A control lane read by an asyncio loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from ...errors import PipelineError
from .lanes import ControlLane, ZmqLane
from .messages import Message

POLL_S = 0.1


class AsyncLane:
    """Calls ``take`` with each message of a lane, on the event loop it was constructed in.

    A ZMQ lane is read when its descriptor becomes readable, any other lane by a thread.

    Args:
        take: called with each message.
        fail: called once if the lane breaks. It is not read after that.
    """

    def __init__(self, lane: ControlLane, take: Callable[[Message], None], fail: Callable[[PipelineError], None]):
        self._lane, self._take, self._fail = lane, take, fail
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._thread: threading.Thread | None = None
        if isinstance(lane, ZmqLane):
            self._loop.add_reader(lane.fileno(), self._drain)
            self._loop.call_soon(self._drain)  # the descriptor shows changes, not messages that are already there
        else:
            self._thread = threading.Thread(target=self._read, name="ssd-lane", daemon=True)
            self._thread.start()

    def send(self, message: Message) -> None:
        """Sends a message without waiting.

        Raises:
            PipelineError: nobody is at the other end.
            RequestError: a value of the message is out of the wire's range.
        """
        self._lane.send(message, wait=False)
        if isinstance(self._lane, ZmqLane):
            self._loop.call_soon(self._drain)  # sending may have cleared the descriptor's signal

    def look(self) -> None:
        """Takes messages that the descriptor may not have announced."""
        if isinstance(self._lane, ZmqLane):
            self._drain()

    async def close(self) -> None:
        """Stops reading. The lane itself stays open."""
        if self._open and isinstance(self._lane, ZmqLane):
            self._loop.remove_reader(self._lane.fileno())
        self._open = False
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _drain(self) -> None:
        try:
            while self._open and (message := self._lane.receive(0)) is not None:
                self._take(message)
        except PipelineError as error:
            self._break(error)

    def _read(self) -> None:
        while self._open:
            try:
                message = self._lane.receive(POLL_S)
            except PipelineError as error:
                self._loop.call_soon_threadsafe(self._break, error)
                return
            if message is not None:
                self._loop.call_soon_threadsafe(self._give, message)

    def _give(self, message: Message) -> None:
        if self._open:
            try:
                self._take(message)
            except PipelineError as error:
                self._break(error)

    def _break(self, error: PipelineError) -> None:
        if self._open:
            if isinstance(self._lane, ZmqLane):
                self._loop.remove_reader(self._lane.fileno())
            self._open = False
            self._fail(error)
