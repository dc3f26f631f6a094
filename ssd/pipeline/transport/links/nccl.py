"""The link over NCCL: frames cross between two GPUs."""

# torch declares neither the methods of its process groups nor their options.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ....errors import LinkError, first_line
from .base import nothing

ABORT_S = 5.0
"""How long an abort may take: it can block for ever where CUDA graphs hold the communicator."""
NEVER = datetime.timedelta(days=365)
_HELLO = (0x55D11, 0x11D55)
"""What each end greets the other with; by rank, so that nobody takes its own for the other's."""


class NcclLink:
    """Two ranks over NCCL, one communicator of their own.

    Sends and receives of an exchange are one group launch, the only order in which NCCL cannot
    deadlock two peers (NCCL user guide, point-to-point; what ``batch_isend_irecv`` does). NCCL itself
    knows no deadline, and torch's, when passed, ends the process: so ours is kept here by looking
    whether the work is done, and the group is aborted when it is not.

    A new link is warm: both ends have greeted each other over it. NCCL makes its communicator and connects with the
    first transfer, most of a second, which would otherwise be a round's.

    Args: timeout_s: of every transfer. meet_s: for both ends to come; ``timeout_s`` by default.
    """

    def __init__(
        self, store: dist.Store, rank: int, timeout_s: float, device: torch.device, meet_s: float | None = None
    ):
        self._peer, self._device, self._timeout_s = 1 - rank, device, meet_s or timeout_s
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = NEVER
        torch.cuda.set_device(device)
        # A stream of our own: the forward's must not wait for the peer.
        self._stream = torch.cuda.Stream(device)
        try:
            self._group = dist.ProcessGroupNCCL(store, rank, 2, options)
        except RuntimeError as error:
            raise LinkError(f"could not link draft and verifier: {first_line(error)}") from error
        self._greet(rank)
        self._timeout_s = timeout_s

    def _greet(self, rank: int) -> None:
        landed = np.zeros(1, dtype=np.int32)
        self._move("greeting", np.array([_HELLO[rank]], dtype=np.int32), landed, nothing)
        if landed.item() != _HELLO[1 - rank]:
            self.close()
            raise LinkError("what came to the link was not its other end")

    def exchange(self, outgoing: np.ndarray, incoming: np.ndarray, meanwhile: Callable[[], None] = nothing) -> None:
        self._move("exchange", outgoing, incoming, meanwhile)

    def send(self, outgoing: np.ndarray) -> None:
        self._move("send", outgoing, None, nothing)

    def receive(self, incoming: np.ndarray) -> None:
        self._move("receive", None, incoming, nothing)

    @property
    def arrived(self) -> bool | None:
        return None

    def _move(
        self, what: str, outgoing: np.ndarray | None, incoming: np.ndarray | None, meanwhile: Callable[[], None]
    ) -> None:
        group = self._group
        if group is None:
            raise LinkError("the link is closed")
        try:
            with torch.cuda.stream(self._stream):
                staged = None if outgoing is None else torch.from_numpy(outgoing).to(self._device)
                into = None if incoming is None else torch.from_numpy(incoming)
                landing = None if into is None else torch.empty_like(into, device=self._device)
                group._start_coalescing(self._device)
                if staged is not None:
                    group.send([staged], self._peer, 0)
                if landing is not None:
                    group.recv([landing], self._peer, 0)
                work = group._end_coalescing(self._device)
                meanwhile()
                self._wait(work, what)
                work.wait()  # orders our stream behind NCCL's, now at once
                if into is not None and landing is not None:
                    into.copy_(landing)
        except RuntimeError as error:
            if isinstance(error, LinkError):
                raise
            self.close()
            raise LinkError(f"{what} failed: {first_line(error)}") from error

    def _wait(self, work: Any, what: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                self.close()
                raise LinkError(f"{what} failed: the other end sent nothing for {self._timeout_s:g} s")
            time.sleep(0)

    def close(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return

        def abort() -> None:
            with contextlib.suppress(RuntimeError):
                group.abort()

        watchdog = threading.Thread(target=abort, name="ssd-nccl-abort", daemon=True)
        watchdog.start()
        watchdog.join(ABORT_S)
