"""The link between draft and verifier: frames of fixed size, one grouped exchange per round.

Both ends post their transfer and then wait for it. Neither end needs the other to have posted
first, and no transfer stays pending between two exchanges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np


class Link(ABC):
    """One end of a private two-ended channel.

    Frames are flat int32 arrays in host memory. They are numpy arrays because a torch call right
    after a forward costs several times a numpy call.

    One transfer is under way at a time: ``post`` may be called again once ``Pending.wait`` has
    returned. After a ``LinkError`` the link is dead and every further call raises ``LinkError``.
    """

    def __init__(self) -> None:
        self._pending = Pending(self)

    def post(self, outgoing: np.ndarray | None, incoming: np.ndarray | None) -> Pending:
        """Starts to send one frame and to receive another, and returns without waiting.

        Args:
            outgoing: frame to send; unchanged until the wait returns. None sends nothing.
            incoming: filled once the wait has returned. None receives nothing.

        Raises:
            LinkError: the link is closed, or the other end is gone.
        """
        self._begin(outgoing, incoming)
        return self._pending

    def exchange(self, outgoing: np.ndarray, incoming: np.ndarray) -> None:
        """Sends one frame and receives another. Raises: LinkError, as ``Pending.wait``."""
        self.post(outgoing, incoming).wait()

    def send(self, outgoing: np.ndarray) -> None:
        """Sends one frame. Raises: LinkError, as ``Pending.wait``."""
        self.post(outgoing, None).wait()

    def receive(self, incoming: np.ndarray) -> None:
        """Receives one frame. Raises: LinkError, as ``Pending.wait``."""
        self.post(None, incoming).wait()

    @property
    @abstractmethod
    def arrived(self) -> bool | None:
        """Whether an unread frame is here. None if this link cannot tell without receiving."""

    @abstractmethod
    def close(self) -> None:
        """Closes this end. May be called twice, and from another thread."""

    @abstractmethod
    def _begin(self, outgoing: np.ndarray | None, incoming: np.ndarray | None) -> None:
        """Implements ``post``."""

    @abstractmethod
    def _end(self) -> None:
        """Implements ``Pending.wait``."""


class Pending:
    """A transfer under way. Every link has one such object and reuses it for each transfer."""

    __slots__ = ("_link",)

    def __init__(self, link: Link):
        self._link = link

    def wait(self) -> None:
        """Returns when the frame was sent and the incoming array is filled.

        Raises:
            LinkError: the other end closed the link, or did nothing for the link's ``timeout_s``
                counted from this call.
        """
        self._link._end()
