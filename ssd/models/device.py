"""Device helpers of a worker: its stream, free memory, and small transfers with one wait per round.

On a CPU most of them do nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import psutil
import torch
from torch import Tensor

from ..errors import ConfigError

Priority = Literal["normal", "high"]
SPARE = 0.1
"""Share of the free memory that is left for activations, graphs and other processes."""


class Written:
    """An int64 tensor that the host rewrites every round.

    Written through numpy: directly after a forward, which has evicted the processor's caches, a call of torch costs a
    noticeable share of a round.

    Args:
        shape: of the tensor.
        device: where it is read.
    """

    def __init__(self, *shape: int, device: torch.device):
        self._device, self._host = device, torch.zeros(shape, dtype=torch.int64)
        self._view = self._host.numpy()

    def write(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Returns ``values`` as a tensor on the device, without waiting for it.

        On a CPU it is the same storage every time, so the next call overwrites the result. CUDA reads small
        pageable memory before the copy returns, so there each result is separate.
        """
        self._view[:] = values
        return self._host if self._device.type == "cpu" else self._host.to(self._device, non_blocking=True)


class Courier:
    """Brings small tensors from the device to the host with one wait; ``Tensor.cpu`` would wait for each tensor.

    One worker owns it and calls it from its own thread.
    """

    def __init__(self, device: torch.device):
        self._device, self._buffer, self._done = device, torch.empty(0), None

    def fetch(self, *tensors: Tensor) -> list[Tensor]:
        """Returns int64 tensors on the host: gathered on the device, copied to pinned memory, waited for once.

        The results are copies on CUDA, and the tensors themselves elsewhere.
        """
        if self._device.type != "cuda":
            return list(tensors)
        packed = torch.cat([tensor.reshape(-1) for tensor in tensors])
        if self._buffer.numel() < packed.numel() or self._done is None:
            self._buffer = torch.empty(packed.numel(), dtype=torch.int64, pin_memory=True)
            self._done = torch.cuda.Event()
        landing = self._buffer[: packed.numel()]
        landing.copy_(packed, non_blocking=True)
        self._done.record()
        self._done.synchronize()
        parts = landing.clone().split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@contextlib.contextmanager
def own_stream(device: torch.device | str, priority: Priority = "normal") -> Iterator[None]:
    """Runs this thread's work on a new stream, so that two workers in one process overlap on one GPU.

    Args:
        device: on a CPU nothing happens.
        priority: ``high`` gets free multiprocessors before ``normal``.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device, -1 if priority == "high" else 0)):
        yield


def free_bytes(device: torch.device) -> int:
    """Returns the bytes that could be allocated on the device now, torch's own reserve included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def check_cache_fits(needed: int, slots: int, device: torch.device) -> None:
    """Checks that a KV cache fits beside the weights.

    Args:
        needed: bytes of the cache.
        slots: slots of a sequence, scratch slots included.
        device: where it will be allocated.

    Raises:
        ConfigError: it does not fit; the message says how many tokens would.
    """
    free = int(free_bytes(device) * (1 - SPARE))
    if needed > free:
        raise ConfigError(
            f"the KV cache needs {needed / 1e9:.2f} GB and {device} has {free / 1e9:.2f} GB for it; lower "
            f"engine.max_batch, or engine.max_model_len to about {slots * free // needed}"
        )
