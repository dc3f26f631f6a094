"""CUDA's capture against a twin of ``torch.cuda``: which stream it uses, and what a failed capture leaves behind."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from ssd.models.cuda import graphs
from ssd.models.cuda.graphs import CudaCapture, Graphs, refusals

CPU = torch.device("cpu")


@dataclass(eq=False)
class TwinStream:
    device: Any = None
    priority: int = 0

    def wait_stream(self, stream: TwinStream) -> None:
        pass


class TwinGraph:
    """``torch.cuda.CUDAGraph``: ends a capture with an error if anything went wrong in it."""

    def replay(self) -> None:
        pass


@dataclass
class TwinCuda:
    """The parts of ``torch.cuda`` that a capture uses, with its state: the current stream and the pools in use."""

    current: TwinStream = field(default_factory=TwinStream)
    captured_on: list[TwinStream] = field(default_factory=list)
    pools: list[object] = field(default_factory=list)
    recording: set[int] = field(default_factory=set)

    def current_stream(self, device: Any = None) -> TwinStream:
        return self.current

    def set_stream(self, stream: TwinStream) -> None:
        self.current = stream

    def graph_pool_handle(self) -> object:
        return object()

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def stream(self, stream: TwinStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(
        self, cuda_graph: TwinGraph, pool: object, stream: TwinStream, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """As torch's: a failed capture restores neither the stream nor the pool."""
        if id(pool) in self.recording:
            raise RuntimeError("already recording to mempool_id")
        before, self.current = self.current, stream
        self.captured_on.append(stream)
        self.pools.append(pool)
        self.recording.add(id(pool))
        yield
        self.recording.discard(id(pool))
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> TwinCuda:
    twin = TwinCuda()
    for name in ("current_stream", "set_stream", "graph_pool_handle", "device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(twin, name))
    monkeypatch.setattr(torch.cuda, "Stream", TwinStream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", TwinGraph)
    return twin


@pytest.mark.parametrize("name", ["current_stream", "set_stream", "graph_pool_handle", "stream", "graph"])
def test_the_twin_takes_torchs_own_arguments(name: str) -> None:
    theirs = inspect.signature(getattr(torch.cuda, name)).parameters
    assert set(inspect.signature(getattr(TwinCuda(), name)).parameters) <= set(theirs)


@pytest.mark.parametrize("priority", [0, -1])
def test_captures_keep_the_priority_of_the_workers_stream(cuda: TwinCuda, priority: int) -> None:
    """CUDA replays a graph's kernels with the priority of the stream that captured them."""
    capture = CudaCapture(CPU)
    with cuda.stream(TwinStream(priority=priority)):
        for _ in range(2):
            capture(lambda: None)
    assert [stream.priority for stream in cuda.captured_on] == [priority] * 2


def test_captures_of_one_worker_share_a_pool_and_a_stream(cuda: TwinCuda) -> None:
    capture = CudaCapture(CPU)
    for _ in range(3):
        capture(lambda: None)
    assert len(set(cuda.pools)) == len(set(cuda.captured_on)) == 1
    assert cuda.captured_on[0] is not cuda.current


def third_call_fails(error: Exception) -> Callable[[], None]:
    """Work that runs in warm-ups and fails in the capture."""
    calls = []

    def work() -> None:
        calls.append(None)
        if len(calls) == graphs.WARM_UPS + 1:
            raise error

    return work


def test_a_failed_capture_restores_the_stream_and_spares_later_captures(cuda: TwinCuda) -> None:
    capture, here = CudaCapture(CPU), cuda.current
    capture(lambda: None)
    with pytest.raises(RuntimeError, match="not permitted"):
        capture(third_call_fails(RuntimeError("operation not permitted when stream is capturing")))
    assert cuda.current is here
    for _ in range(2):
        capture(lambda: None)
    assert cuda.current is here
    assert cuda.pools[2] is cuda.pools[3] is not cuda.pools[1]


def test_one_body_that_cannot_be_captured_leaves_the_others_captured(
    cuda: TwinCuda, caplog: pytest.LogCaptureFixture
) -> None:
    made = Graphs(CPU, CudaCapture(CPU))
    failing = third_call_fails(RuntimeError("not permitted"))
    with caplog.at_level(logging.WARNING):
        made.of(failing, "first")()
        for name in ("second", "third"):
            made.of(lambda: None, name)()
    assert [record.getMessage() for record in caplog.records] == ["first runs without a CUDA graph: not permitted"]


def test_kernels_that_triton_refuses_are_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    refused = errors.OutOfResources(172160, 101376, "shared memory")
    assert not isinstance(refused, RuntimeError) and isinstance(refused, refusals())

    def refusing(work: Callable[[], Any]) -> Any:
        raise refused

    with caplog.at_level(logging.WARNING):
        assert Graphs(CPU, refusing).of(lambda x: x + 1, "verify")(torch.ones(1)).tolist() == [2.0]
    assert "verify runs without a CUDA graph: out of resource: shared memory" in caplog.text


def test_a_bodys_own_error_is_raised() -> None:
    def body() -> None:
        raise RuntimeError("wrong shape")

    def capture(work: Callable[[], Any]) -> Any:
        return work(), None

    with pytest.raises(RuntimeError, match="wrong shape"):
        Graphs(CPU, capture).of(body, "verify")()
