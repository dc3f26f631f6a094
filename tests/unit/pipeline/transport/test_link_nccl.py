"""What ``NcclLink`` does around NCCL, without a GPU: over a twin of torch's process group.

That its transfers move bytes between GPUs is for ``tests/contract/test_link.py``.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d

from ssd.errors import LinkError
from ssd.pipeline.transport.links.nccl import NcclLink

CPU = torch.device("cpu")


class Group:
    """Transfers begin when both ends have launched theirs, as NCCL's do; the first is slow."""

    CONNECT_S = 0.3
    BLOCKS_S = 0.0
    ABORTS_S = 0.0
    ends: dict[int, Group]

    class Options:
        _timeout = None

    def __init__(self, store: Any, rank: int, size: int, options: Any):
        assert size == 2 and options._timeout.days == 365  # NCCL's own deadline would end the process
        self.environment = dict(os.environ)
        if self.BLOCKS_S:
            time.sleep(self.BLOCKS_S)
        self.rank, self.aborted = rank, False
        self.sent: list[Tensor | None] = []
        self.launched_on: list[object] = []
        self.ends[rank] = self

    def _start_coalescing(self) -> None:
        self.launched_on.append(CURRENT.get())
        self._sending: Tensor | None = None
        self._landing: Tensor | None = None

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> None:
        (self._sending,) = tensors

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> None:
        (self._landing,) = tensors

    def _end_coalescing(self) -> Group.Work:
        # The frame is there before its launch counts: the other end's thread looks at any moment.
        self.sent.append(None if self._sending is None else self._sending.clone())
        return Group.Work(self, self.launched - 1, self._landing, time.monotonic())

    @property
    def launched(self) -> int:
        return len(self.sent)

    def abort(self) -> None:
        time.sleep(self.ABORTS_S)
        self.aborted = True

    class Work:
        def __init__(self, group: Group, number: int, landing: Tensor | None, began_s: float):
            self.group, self.number, self.landing, self.began_s = group, number, landing, began_s

        def is_completed(self) -> bool:
            other = Group.ends.get(1 - self.group.rank)
            if other is None or other.launched <= self.number:
                return False
            return self.number > 0 or time.monotonic() - self.began_s >= Group.CONNECT_S

        def wait(self) -> None:
            if self.landing is not None:
                frame = Group.ends[1 - self.group.rank].sent[self.number]
                assert frame is not None  # both exchange, or one sends and the other receives
                self.landing.copy_(frame)


CURRENT: ContextVar[object] = ContextVar("stream", default="the worker's stream")  # of each thread


@contextlib.contextmanager
def on_stream(stream: object) -> Iterator[None]:
    token = CURRENT.set(stream)
    yield
    CURRENT.reset(token)


@pytest.fixture(autouse=True)
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    Group.ends = {}
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "the link's stream")
    monkeypatch.setattr(torch.cuda, "stream", on_stream)


@pytest.mark.parametrize("name", ["_start_coalescing", "_end_coalescing", "send", "recv", "abort"])
def test_the_twin_has_the_signatures_of_torch(name: str) -> None:
    """``ProcessGroupNCCL`` is a ``Backend``, which CPU builds of torch have; a ``ProcessGroup`` differs."""
    declared = str(getattr(_distributed_c10d.Backend, name).__doc__).split(") -> ")[0]
    declared_names = [argument.split(":")[0].strip() for argument in declared.split("(", 1)[1].split(", ")]
    assert len(inspect.signature(getattr(Group, name)).parameters) == len(declared_names)


def link(rank: int, meet_s: float = 10.0) -> NcclLink:
    return NcclLink(dist.HashStore(), rank, 5.0, CPU, meet_s)


def test_a_new_link_is_warm() -> None:
    """Connecting falls into its making, and the first round's frames are its second transfer."""
    with ThreadPoolExecutor(2) as pool:
        began = time.monotonic()
        ends = [future.result(10) for future in [pool.submit(link, rank) for rank in (0, 1)]]
        assert time.monotonic() - began >= Group.CONNECT_S
        assert [group.launched for group in Group.ends.values()] == [1, 1]
        frames = [np.arange(3, dtype=np.int32), np.arange(7, dtype=np.int32)]
        landed = [np.zeros_like(frames[1]), np.zeros_like(frames[0])]
        moves = [pool.submit(end.exchange, frame, into) for end, frame, into in zip(ends, frames, landed, strict=True)]
        for move in moves:
            move.result(10)
    assert np.array_equal(landed[0], frames[1]) and np.array_equal(landed[1], frames[0])
    assert [group.launched for group in Group.ends.values()] == [2, 2]


def test_an_end_that_does_not_come_is_given_up_in_time() -> None:
    began = time.monotonic()
    with pytest.raises(LinkError, match=r"0\.2 s"):
        link(0, meet_s=0.2)
    assert time.monotonic() - began < 5
    assert Group.ends[0].aborted


def test_whoever_closes_returns_once_the_group_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link's own deadline and its owner's may pass at the same moment."""
    monkeypatch.setattr(Group, "ABORTS_S", 0.3)

    def close(end: NcclLink) -> bool:
        end.close()
        return Group.ends[0].aborted

    with ThreadPoolExecutor(4) as pool:
        one, other = [future.result(10) for future in [pool.submit(link, rank) for rank in (0, 1)]]
        assert [future.result(10) for future in [pool.submit(close, one) for _ in range(4)]] == [True] * 4
    other.close()


def test_a_group_that_blocks_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL connects within its first transfer, without any deadline."""
    monkeypatch.setattr(Group, "BLOCKS_S", 3.0)
    began = time.monotonic()
    with pytest.raises(LinkError, match=r"did not come to the link in 0\.2 s"):
        link(0, meet_s=0.2)
    assert time.monotonic() - began < 2
    time.sleep(3.2 - (time.monotonic() - began))  # the twin's own thread ends


def test_between_post_and_wait_the_workers_stream_is_current() -> None:
    """Kernels that the caller launches meanwhile belong to its own stream, not to the link's."""
    with ThreadPoolExecutor(2) as pool:
        one, other = [future.result(10) for future in [pool.submit(link, rank) for rank in (0, 1)]]
    landed = np.zeros(2, dtype=np.int32)
    pending = one.post(np.arange(2, dtype=np.int32), landed)
    assert CURRENT.get() == "the worker's stream"
    assert Group.ends[0].launched_on[-1] == "the link's stream"
    other.post(np.arange(2, dtype=np.int32) + 5, np.zeros(2, dtype=np.int32))
    pending.wait()
    assert landed.tolist() == [5, 6] and CURRENT.get() == "the worker's stream"


def test_torch_does_not_end_the_process_when_the_other_end_fails() -> None:
    """Its watchdog and its monitor are off for the link's group, and for nothing that is made later."""
    before = dict(os.environ)
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(link, rank) for rank in (0, 1)]:
            future.result(10)
    for group in Group.ends.values():
        assert group.environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
        assert group.environment["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert dict(os.environ) == before


def test_two_ends_of_the_same_rank_do_not_link() -> None:
    """What greets like ourselves is not our other end."""
    Group.ends[1] = stranger = Group(None, 1, 2, type("Options", (), {"_timeout": type("T", (), {"days": 365})}))
    stranger.sent = [torch.tensor([0x55D11], dtype=torch.int32)]
    with pytest.raises(LinkError, match="not the other end's"):
        link(0)
    assert Group.ends[0].aborted
