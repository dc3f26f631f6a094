"""What a caller of ``AsyncEngine.submit`` reads."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import SSDError
from ..request.output import RequestOutput, StreamEvent
from .book import Request

if TYPE_CHECKING:
    from .async_engine import AsyncEngine


class RequestStream:
    """The events of one request: ``async for event in stream``. The last one carries the output; with
    ``n`` > 1 every completion has a last one, and their events mix (``event.index``).

    Leaving its ``async with`` block, or ``cancel``, gives the request up; its slot is free within a
    round. What has been committed is never held back for a slow reader: it waits here, and is no
    more than the request's ``max_tokens``.

    Raises (iterating): PipelineError if the pipeline broke.
    """

    def __init__(self, engine: AsyncEngine, requests: list[Request]):
        self._engine, self.requests = engine, requests
        self._events: asyncio.Queue[StreamEvent | SSDError] = asyncio.Queue()
        self._left = len(requests)
        """Completions whose last event its reader does not have."""

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

    async def output(self) -> RequestOutput:
        """Wait for the end; as ``LLM.generate`` gives it. Cancels the request if the waiting is
        cancelled."""
        async with self:
            outputs = [event.output async for event in self if event.output is not None]
        first, *others = sorted(outputs, key=lambda output: output.index)
        return replace(first, others=tuple(others)) if others else first

    def cancel(self) -> None:
        """Give the request up, if it is not over. Its last event still comes."""
        for request in self.requests:
            self._engine._cancel(request)

    def _put(self, event: StreamEvent | SSDError) -> None:
        self._events.put_nowait(event)
