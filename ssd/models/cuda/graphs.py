"""CUDA graphs: the work of a body is captured once and replayed ever after.

Launching a decode forward kernel by kernel costs the host more than a small model costs the GPU: a
0.6 B draft spends about 2.5 ms on launches that compute for 0.4. A replay is one launch.

A graph reads and writes fixed addresses. Small arguments are copied into buffers of its own before each
replay; large ones (a batch's noise) are read where they lie, and another place means another graph.
What a body returns is overwritten by its next call.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Body = Callable[..., Any]
Capture = Callable[[Body], tuple[Callable[[], None], Any]]
"""From work without arguments to its replay and what it returned (to be filled by each replay)."""

LARGE_BYTES = 1 << 20
"""Arguments from this size on are not copied."""
WARM_UPS = 2
"""Runs before a capture: libraries and Triton set themselves up in them, which a capture forbids."""
PLACES = 8
"""Places of large arguments a body keeps graphs for."""

# torch allows one capture at a time in a process; draft and verifier may share one.
_CAPTURING = threading.Lock()
log = logging.getLogger(__name__)


class Graphs:
    """Makes captured bodies of one model on one device. Their graphs share a memory pool, so they must
    be replayed one after another, from one thread.

    Args:
        capture: CUDA's by default; a twin in tests.
    """

    def __init__(self, device: torch.device, capture: Capture | None = None):
        self._device = device
        self._capture = capture or cuda_capture(device)

    def of(self, body: Body, name: str) -> Body:
        """``body``, captured when first called. Its arguments (tensors, and tuples of them) must always
        have the shapes of its first call, and whatever else it uses must stay where it is; it must not
        wait for the device. Where it cannot be captured, it runs as it is, and the log says why."""
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
                self._give_up("its large arguments lie somewhere else in every call")
                return self._body(*args)
            try:
                graph = _Graph(self._body, leaves, form, self._device, self._capture)
            except RuntimeError as error:
                self._give_up((str(error).strip() or type(error).__name__).splitlines()[0])
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


def cuda_capture(device: torch.device) -> Capture:
    """Captures on a side stream, into a memory pool of its own.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    pool, side = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(work: Body) -> tuple[Callable[[], None], Any]:
        with _CAPTURING, torch.cuda.device(device):
            here = torch.cuda.current_stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    work()
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # The other worker of a shared process may go on allocating meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                outputs = work()
        return graph.replay, outputs

    return capture
