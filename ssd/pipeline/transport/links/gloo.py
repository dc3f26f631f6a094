"""A link over gloo, for draft and verifier on two machines."""

# torch declares neither the methods of its process groups nor their options.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import datetime
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from ....errors import LinkError, first_line
from .base import nothing


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
