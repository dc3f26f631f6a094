"""The link over gloo, between two machines."""

# torch declares neither the methods of its process groups nor their options.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import datetime
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ....errors import LinkError, first_line
from .base import Link


class GlooLink(Link):
    """Two ranks over gloo, in a process group separate from any WORLD.

    Args:
        timeout_s: longest wait for a transfer.
        meet_s: longest wait for the other end to come; ``timeout_s`` by default.
        host: address to listen on and be reached at; by default the address of this machine's name.

    Raises:
        LinkError: the other end did not come within ``meet_s``.
    """

    def __init__(
        self, store: dist.Store, rank: int, timeout_s: float, meet_s: float | None = None, host: str | None = None
    ):
        super().__init__()
        self._peer, self._timeout_s = 1 - rank, timeout_s
        self._works: list[Any] = []
        try:
            options = dist.ProcessGroupGloo._Options()
            options._timeout = datetime.timedelta(seconds=meet_s or timeout_s)
            backend = dist.ProcessGroupGloo
            options._devices = [backend.create_device(hostname=host) if host else backend.create_default_device()]
            self._group = backend(store, rank, 2, options)
        except RuntimeError as error:
            raise LinkError(f"could not link draft and verifier: {first_line(error)}") from error

    def _begin(self, outgoing: np.ndarray | None, incoming: np.ndarray | None) -> None:
        group = self._group
        if group is None:
            raise LinkError("the link is closed")
        # Receive first: gloo's send is not buffered, so two ends that both send first would block each other.
        self._works = []
        try:
            if incoming is not None:
                self._works.append(group.recv([torch.from_numpy(incoming)], self._peer, 0))
            if outgoing is not None:
                self._works.append(group.send([torch.from_numpy(outgoing)], self._peer, 0))
        except RuntimeError as error:
            raise LinkError(f"the transfer could not start: {first_line(error)}") from error

    def _end(self) -> None:
        works, self._works = self._works, []
        deadline = time.monotonic() + self._timeout_s
        try:
            for work in works:
                # A timeout of zero would mean "no timeout" to torch.
                left_s = max(1e-3, deadline - time.monotonic())
                work.wait(datetime.timedelta(seconds=left_s))
        except RuntimeError as error:
            raise LinkError(f"the transfer failed: {first_line(error)}") from error

    @property
    def arrived(self) -> bool | None:
        return None

    def close(self) -> None:
        self._group = None  # dropping the group closes its sockets
