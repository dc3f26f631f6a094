"""The link between draft and verifier: frames of fixed size, one grouped exchange per round.

Both sides post the exchange together, so neither waits for the other to have sent; nothing
stays pending between exchanges. Every wait has a deadline.
"""

# torch declares neither the methods of its process groups nor their options.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import datetime
import queue
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from ..errors import LinkError
from ..models.tensor_group import first_line


def nothing() -> None:
    """What is done meanwhile, by default."""


class Link(Protocol):
    """A private two-ended channel. Frames are flat int32 arrays in host memory: a call of torch costs a round several
    times what one of numpy does, once a forward has swept the caches.

    Raises (all methods but close):
        LinkError: the other end is gone or missed the deadline; the link is then dead.

    Beside the links here: ``link_shared.SharedLink``, ``link_host.HostLink`` and ``link_nccl.NcclLink``.
    """

    def exchange(self, outgoing: np.ndarray, incoming: np.ndarray, meanwhile: Callable[[], None] = nothing) -> None:
        """Send one frame and receive one, as one group; ``meanwhile`` runs once both are
        under way."""

    def send(self, outgoing: np.ndarray) -> None: ...

    def receive(self, incoming: np.ndarray) -> None: ...

    @property
    def arrived(self) -> bool | None:
        """Whether a frame is here that was not received yet; None where only receiving tells."""

    def close(self) -> None: ...


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


class GlooLink:
    """Two ranks over gloo, in a group of their own beside any WORLD.

    Args:
        timeout_s: of every send and receive. meet_s: for both ends to come; ``timeout_s`` by default.
        host: address to listen on and be reached at; by default whatever this machine's name means.
    """

    def __init__(
        self, store: dist.Store, rank: int, timeout_s: float, meet_s: float | None = None, host: str | None = None
    ):
        self._peer, self._timeout = 1 - rank, datetime.timedelta(seconds=timeout_s)
        try:
            options = dist.ProcessGroupGloo._Options()
            options._timeout = datetime.timedelta(seconds=meet_s or timeout_s)
            backend = dist.ProcessGroupGloo
            options._devices = [backend.create_device(hostname=host) if host else backend.create_default_device()]
            self._group = backend(store, rank, 2, options)
        except RuntimeError as error:
            raise LinkError(f"could not link draft and verifier: {first_line(error)}") from error

    def exchange(self, outgoing: np.ndarray, incoming: np.ndarray, meanwhile: Callable[[], None] = nothing) -> None:
        group = self._alive()
        # Receive first: gloo's blocking send is not buffered, two senders would wait forever.
        try:
            receiving = group.recv([torch.from_numpy(incoming)], self._peer, 0)
            sending = group.send([torch.from_numpy(outgoing)], self._peer, 0)
            meanwhile()
            receiving.wait(self._timeout)
            sending.wait(self._timeout)
        except RuntimeError as error:
            raise LinkError(f"exchange failed: {first_line(error)}") from error

    def send(self, outgoing: np.ndarray) -> None:
        group = self._alive()
        try:
            group.send([torch.from_numpy(outgoing)], self._peer, 0).wait(self._timeout)
        except RuntimeError as error:
            raise LinkError(f"send failed: {first_line(error)}") from error

    def receive(self, incoming: np.ndarray) -> None:
        group = self._alive()
        try:
            group.recv([torch.from_numpy(incoming)], self._peer, 0).wait(self._timeout)
        except RuntimeError as error:
            raise LinkError(f"receive failed: {first_line(error)}") from error

    def _alive(self) -> dist.ProcessGroupGloo:
        if self._group is None:
            raise LinkError("the link is closed")
        return self._group

    @property
    def arrived(self) -> bool | None:
        return None

    def close(self) -> None:
        self._group = None  # its sockets close with it
