"""The link inside one process: the twin of the links between processes."""

from __future__ import annotations

import queue

import numpy as np

from ....errors import LinkError
from .base import Link


class InprocLink(Link):
    """Both ends in one process, over two queues."""

    def __init__(self, outbox: queue.Queue, inbox: queue.Queue, timeout_s: float):
        super().__init__()
        self._outbox, self._inbox, self._timeout_s = outbox, inbox, timeout_s
        self._incoming: np.ndarray | None = None
        self._dead = False

    @classmethod
    def pair(cls, timeout_s: float = 60.0) -> tuple[InprocLink, InprocLink]:
        """Returns the two ends of a new link."""
        one: queue.Queue = queue.Queue()
        other: queue.Queue = queue.Queue()
        return cls(one, other, timeout_s), cls(other, one, timeout_s)

    def _begin(self, outgoing: np.ndarray | None, incoming: np.ndarray | None) -> None:
        if self._dead:
            raise LinkError("the link is closed")
        if outgoing is not None:
            self._outbox.put(outgoing.copy())
        self._incoming = incoming

    def _end(self) -> None:
        incoming, self._incoming = self._incoming, None
        if incoming is None:
            return
        if self._dead:
            raise LinkError("the link is closed")
        try:
            frame = self._inbox.get(timeout=self._timeout_s)
        except queue.Empty:
            self.close()
            raise LinkError(f"the other end sent nothing for {self._timeout_s:g} s") from None
        if frame is None:
            self.close()
            raise LinkError("the other end closed the link")
        if frame.shape != incoming.shape:
            self.close()
            raise LinkError(f"received a frame of {frame.size} words where {incoming.size} were due")
        incoming[:] = frame

    @property
    def arrived(self) -> bool | None:
        return not self._inbox.empty()

    def close(self) -> None:
        if not self._dead:
            self._dead = True
            self._outbox.put(None)
