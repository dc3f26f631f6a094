"""The link over NCCL: frames cross between two GPUs."""

# torch declares neither the methods of its process groups nor their options.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ....errors import LinkError, first_line
from .base import Link

ABORT_S = 5.0
"""Longest time an abort may take. It can block for ever if CUDA graphs hold the communicator."""
NEVER = datetime.timedelta(days=365)
_HELLO = (0x55D11, 0x11D55)
"""The greeting of each rank. They differ so that no end mistakes its own greeting for the other's."""

_NO_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
"""How a process group is made whose own threads never end the process when the other end fails. Read from the
environment by its constructor; there is no other way to say it."""
_making = threading.Lock()
"""The environment is the whole process's."""


class NcclLink(Link):
    """Two ranks over NCCL, with a communicator used for nothing else.

    The sends and receives of a transfer are one group launch, the only order in which NCCL cannot
    deadlock two peers (NCCL user guide, point-to-point; ``batch_isend_irecv`` does the same). NCCL
    has no deadlines, and torch's deadline ends the process. So this link polls whether the work is
    done, and aborts the group at its own deadline.

    The constructor sends a greeting both ways: NCCL makes its communicator and connects with the
    first transfer, which takes most of a second and would otherwise fall into a round.

    Args:
        timeout_s: longest wait for a transfer.
        meet_s: longest wait for the other end to come; ``timeout_s`` by default.

    Raises:
        LinkError: the other end did not come within ``meet_s``.
    """

    def __init__(
        self, store: dist.Store, rank: int, timeout_s: float, device: torch.device, meet_s: float | None = None
    ):
        super().__init__()
        self._peer, self._device, self._timeout_s = 1 - rank, device, meet_s or timeout_s
        self._work: Any = None
        self._staged: torch.Tensor | None = None
        self._landing: torch.Tensor | None = None
        self._incoming: np.ndarray | None = None
        self._deadline = 0.0
        # Transfers have a stream of their own, so that forwards never wait for the other end.
        self._stream = torch.cuda.Stream(device)
        self._group: Any = None
        self._closing = threading.Lock()
        store.set_timeout(datetime.timedelta(seconds=self._timeout_s))
        met: Future[None] = Future()

        def meet() -> None:
            try:
                met.set_result(self._meet(store, rank))
            except (RuntimeError, TypeError, ValueError, AttributeError, OSError) as error:
                met.set_exception(error)

        # NCCL connects without a deadline, so the caller keeps it.
        threading.Thread(target=meet, name="ssd-nccl-meet", daemon=True).start()
        try:
            met.result(self._timeout_s)
        except TimeoutError:
            met.add_done_callback(lambda _met: self.close())  # the other end may still come
            self.close()
            raise LinkError(f"the other end did not come to the link in {self._timeout_s:g} s") from None
        except LinkError:
            self.close()
            raise
        except RuntimeError as error:
            self.close()
            raise LinkError(f"could not link draft and verifier: {first_line(error)}") from error
        self._timeout_s = timeout_s

    def _meet(self, store: dist.Store, rank: int) -> None:
        """Makes the group and exchanges greetings. May block for ever."""
        torch.cuda.set_device(self._device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = NEVER
        with _making, _environment(_NO_WATCHDOG):
            self._group = dist.ProcessGroupNCCL(store, rank, 2, options)
        landed = np.zeros(1, dtype=np.int32)
        self.exchange(np.array([_HELLO[rank]], dtype=np.int32), landed)
        if landed.item() != _HELLO[1 - rank]:
            raise LinkError("received a greeting that is not the other end's")

    def _begin(self, outgoing: np.ndarray | None, incoming: np.ndarray | None) -> None:
        group = self._group
        if group is None:
            raise LinkError("the link is closed")
        try:
            with torch.cuda.stream(self._stream):
                # Both stay alive until the transfer is done: NCCL reads and writes them from the GPU.
                self._staged = None if outgoing is None else torch.from_numpy(outgoing).to(self._device)
                self._incoming = incoming
                self._landing = None
                if incoming is not None:
                    self._landing = torch.empty(incoming.shape, dtype=torch.int32, device=self._device)
                group._start_coalescing()
                if self._staged is not None:
                    group.send([self._staged], self._peer, 0)
                if self._landing is not None:
                    group.recv([self._landing], self._peer, 0)
                self._work = group._end_coalescing()
                self._deadline = time.monotonic() + self._timeout_s
        except RuntimeError as error:
            self.close()
            raise LinkError(f"the transfer could not start: {first_line(error)}") from error

    def _end(self) -> None:
        work, self._work = self._work, None
        if work is None:
            raise LinkError("the link is closed")
        try:
            self._until_completed(work)
            with torch.cuda.stream(self._stream):
                work.wait()  # orders this link's stream behind NCCL's; raises if the transfer failed
                if self._incoming is not None and self._landing is not None:
                    torch.from_numpy(self._incoming).copy_(self._landing)
        except LinkError:
            raise
        except RuntimeError as error:
            self.close()
            raise LinkError(f"the transfer failed: {first_line(error)}") from error

    def _until_completed(self, work: Any) -> None:
        while not work.is_completed():
            if time.monotonic() > self._deadline:
                self.close()
                raise LinkError(f"the other end sent nothing for {self._timeout_s:g} s")
            time.sleep(0)

    @property
    def arrived(self) -> bool | None:
        return None

    def close(self) -> None:
        with self._closing:  # a second caller returns once the first one's abort is over
            group, self._group = self._group, None
            if group is None:
                return

            def abort() -> None:
                with contextlib.suppress(RuntimeError):
                    group.abort()

            watchdog = threading.Thread(target=abort, name="ssd-nccl-abort", daemon=True)
            watchdog.start()
            watchdog.join(ABORT_S)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for the time inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
