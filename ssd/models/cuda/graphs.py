"""CUDA graphs: a body's kernels are captured once and replayed by every later call.

Launching a decode forward kernel by kernel costs the host more than a small model costs the GPU: a
0.6 B draft spends about 2.5 ms on launches that compute for 0.4. A replay is one launch.

A graph reads and writes fixed addresses. Small arguments are copied into the graph's own buffers before
each replay. Large ones (a batch's noise) are read in place, and a large argument at another address
needs another graph.

All graphs of one ``Graphs`` share a memory pool. A result may lie where a graph that was captured *earlier* has
its temporaries, so it is valid until the next replay of its own graph or of any graph captured before it. Bodies
whose results must outlive others' replays (noise) are captured first.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...errors import first_line

Body = Callable[..., Any]
Capture = Callable[[Body], tuple[Callable[[], None], Any]]
"""Takes work without arguments; returns its replay, and the result that every replay fills."""

LARGE_BYTES = 1 << 20
"""Arguments of at least this size are not copied."""
WARM_UPS = 2
"""Runs before a capture, in which libraries and Triton initialise themselves: a capture forbids that."""
PLACES = 8
"""Address combinations of large arguments that a body keeps graphs for."""

# torch allows one capture at a time in a process; draft and verifier may share one.
_CAPTURING = threading.Lock()
log = logging.getLogger(__name__)


class Graphs:
    """Makes captured bodies of one model on one device. They share a memory pool, so they must be replayed
    one after another, from one thread.

    Args:
        device: where the bodies run.
        capture: CUDA's by default; tests pass a twin.
    """

    def __init__(self, device: torch.device, capture: Capture | None = None):
        self._device = device
        self._capture = capture or CudaCapture(device)

    def of(self, body: Body, name: str) -> Body:
        """Returns ``body``, captured at its first call.

        Its arguments (tensors, and tuples of them) must always have the shapes of the first call, every
        other tensor it uses must keep its address, and it must not wait for the device. A body that cannot be
        captured runs uncaptured, and the log says why.
        """
        return _Captured(body, name, self._device, self._capture)


class _Captured:
    def __init__(self, body: Body, name: str, device: torch.device, capture: Capture):
        self._body, self._name, self._device, self._capture = body, name, device, capture
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._given_up = False

    def __call__(self, *args: Any) -> Any:
        if self._given_up:
            return self._body(*args)
        leaves, form = tree_flatten(args)
        places = tuple(leaf.data_ptr() for leaf in leaves if _stays(leaf))
        graph = self._graphs.get(places)
        if graph is None:
            if len(self._graphs) == PLACES:
                self._give_up("its large arguments are at another address in every call")
                return self._body(*args)
            try:
                graph = _Graph(self._body, leaves, form, self._device, self._capture)
            except refusals() as error:
                self._give_up(first_line(error))
                return self._body(*args)
            self._graphs[places] = graph
        return graph.run(leaves)

    def _give_up(self, why: str) -> None:
        self._given_up = True
        self._graphs.clear()
        log.warning("%s runs without a CUDA graph: %s", self._name, why)


class _Graph:
    def __init__(self, body: Body, leaves: list[Any], form: Any, device: torch.device, capture: Capture):
        self._inputs = [
            torch.empty_like(leaf, device=device).copy_(leaf) if isinstance(leaf, Tensor) and not _stays(leaf) else leaf
            for leaf in leaves
        ]
        args = tree_unflatten(self._inputs, form)
        self._replay, self._outputs = capture(lambda: body(*args))

    def run(self, leaves: list[Any]) -> Any:
        for own, given in zip(self._inputs, leaves, strict=True):
            if own is not given and isinstance(own, Tensor) and not _stays(own):
                own.copy_(given, non_blocking=True)
        self._replay()
        return self._outputs


def _stays(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.nbytes >= LARGE_BYTES


def refusals() -> tuple[type[Exception], ...]:
    """Returns the errors that mean a device cannot run or capture something: torch's are ``RuntimeError``,
    Triton's (a kernel that does not compile, or needs more shared memory than there is) are not."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError  # pyright: ignore[reportMissingImports]

    return RuntimeError, TritonError


class CudaCapture:
    """Captures into a private memory pool, on a side stream with the priority of the caller's stream.

    Graphs replay their kernels with the priority of the stream they were captured on, so a stream of
    default priority would undo the priority of a worker.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool: Any = None
        self._sides: dict[int, torch.cuda.Stream] = {}

    def __call__(self, work: Body) -> tuple[Callable[[], None], Any]:
        with _CAPTURING, torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            side = self._sides.get(here.priority)
            if side is None:
                side = self._sides[here.priority] = torch.cuda.Stream(self._device, priority=here.priority)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    work()
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                # The other worker of a shared process may keep allocating during the capture.
                with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                    outputs = work()
            except BaseException:
                # torch leaves the thread on the side stream, and pool and stream in an unknown state.
                torch.cuda.set_stream(here)
                self._pool = None
                del self._sides[here.priority]
                raise
        return graph.replay, outputs
