"""A link within one process, and the twin of the others in tests."""

from __future__ import annotations

import queue
from collections.abc import Callable

import numpy as np

from ....errors import LinkError
from .base import nothing


class InprocLink:
    """Both ends in one process: the twin of the real ones."""

    def __init__(self, outbox: queue.Queue, inbox: queue.Queue, timeout_s: float):
        self._outbox, self._inbox, self._timeout_s = outbox, inbox, timeout_s
        self._dead = False

    @classmethod
    def pair(cls, timeout_s: float = 60.0) -> tuple[InprocLink, InprocLink]:
        one: queue.Queue = queue.Queue()
        other: queue.Queue = queue.Queue()
        return cls(one, other, timeout_s), cls(other, one, timeout_s)

    def exchange(self, outgoing: np.ndarray, incoming: np.ndarray, meanwhile: Callable[[], None] = nothing) -> None:
        self.send(outgoing)
        meanwhile()
        self.receive(incoming)

    def send(self, outgoing: np.ndarray) -> None:
        if self._dead:
            raise LinkError("the link is closed")
        self._outbox.put(outgoing.copy())

    def receive(self, incoming: np.ndarray) -> None:
        if self._dead:
            raise LinkError("the link is closed")
        try:
            frame = self._inbox.get(timeout=self._timeout_s)
        except queue.Empty:
            self._dead = True
            raise LinkError(f"the other end sent nothing for {self._timeout_s:g} s") from None
        if frame is None:
            self._dead = True
            raise LinkError("the other end closed the link")
        if frame.shape != incoming.shape:
            raise LinkError(f"a frame of {frame.size} words came where {incoming.size} were due")
        incoming[:] = frame

    @property
    def arrived(self) -> bool | None:
        return not self._inbox.empty()

    def close(self) -> None:
        if not self._dead:
            self._dead = True
            self._outbox.put(None)
