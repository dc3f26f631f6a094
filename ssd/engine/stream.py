"""What a caller of ``AsyncEngine`` reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from ..errors import SSDError
from ..request.output import RequestOutput, StreamEvent
from .request import Request


class RequestStream:
    """The events of one request: ``async for event in stream``. The last one carries the output. With ``n`` > 1 every
    completion has a last one, and their events interleave (``event.index``).

    Leaving its ``async with`` block, or ``cancel``, cancels the request; its slot is free within a round. Events wait
    here for a slow reader: at most as many as the request's ``max_tokens``.

    Args:
        requests: The completions.
        give_up: Cancels those of them that are not over.

    Raises (iterating): PipelineError: The pipeline broke.
    """

    def __init__(self, requests: Sequence[Request], give_up: Callable[[Sequence[Request]], None]):
        self.requests, self._give_up = requests, give_up
        self._events: asyncio.Queue[StreamEvent | SSDError] = asyncio.Queue()
        self._left = len(requests)
        """Completions whose last event has not been read."""

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.cancel()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> StreamEvent:
        if not self._left:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, SSDError):
            self._left = 0
            raise event
        self._left -= event.output is not None
        return event

    @property
    def request(self) -> Request:
        """The first completion."""
        return self.requests[0]

    def put(self, event: StreamEvent | SSDError) -> None:
        """Adds an event for the reader. An error is the last one."""
        self._events.put_nowait(event)

    async def output(self) -> RequestOutput:
        """Waits for the end and returns what ``LLM.generate`` would. Cancelling the call cancels the request."""
        async with self:
            return RequestOutput.joined([event.output async for event in self if event.output is not None])

    def cancel(self) -> None:
        """Cancels the request if it is not over. Its last event still comes."""
        self._give_up(self.requests)
