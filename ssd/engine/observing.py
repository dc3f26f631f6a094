"""Who hears what an engine does: an observer, and watchers of its rounds."""

from __future__ import annotations

import asyncio
from typing import Protocol

from ..pipeline.transport.messages import RoundReport
from ..request.output import StreamEvent
from .request import Request
from .restarts import News

ROUNDS_KEPT = 1024
"""Round reports kept for a slow watcher. Older ones are dropped."""


class Observer(Protocol):
    """Hears what happens, on the loop. Its methods must be quick."""

    def event(self, request: Request, event: StreamEvent) -> None:
        """A request has an event."""
        ...

    def round(self, report: RoundReport) -> None:
        """A round of the batch is over."""
        ...

    def draft(self, news: News) -> None:
        """The draft is lost, restarting, back or given up."""
        ...


class Observers:
    """Hands on to several observers."""

    def __init__(self, *observers: Observer):
        self._observers = observers

    def event(self, request: Request, event: StreamEvent) -> None:
        for observer in self._observers:
            observer.event(request, event)

    def round(self, report: RoundReport) -> None:
        for observer in self._observers:
            observer.round(report)

    def draft(self, news: News) -> None:
        for observer in self._observers:
            observer.draft(news)


class Watchers:
    """Hands round reports to every reader."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[RoundReport | None]] = set()

    def __len__(self) -> int:
        return len(self._queues)

    def join(self) -> asyncio.Queue[RoundReport | None]:
        """Returns a new reader's queue. None in it is the end."""
        queue: asyncio.Queue[RoundReport | None] = asyncio.Queue(ROUNDS_KEPT)
        self._queues.add(queue)
        return queue

    def leave(self, queue: asyncio.Queue[RoundReport | None]) -> None:
        """Forgets a reader."""
        self._queues.discard(queue)

    def tell(self, report: RoundReport | None) -> None:
        """Gives every reader a report, or None for the end."""
        for queue in self._queues:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(report)
