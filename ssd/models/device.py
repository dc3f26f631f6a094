"""What workers ask of their device: a stream, memory, and one wait a round. On the CPU mostly nothing."""

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
"""Share of the free memory left to activations, graphs and other processes."""


class Written:
    """An int64 tensor whose contents the host writes anew every round: through numpy, for what torch costs per call
    just after a forward has swept the caches is a share of the round."""

    def __init__(self, *shape: int, device: torch.device):
        self._device, self._host = device, torch.zeros(shape, dtype=torch.int64)
        self._view = self._host.numpy()

    def write(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """On the device, without waiting (CUDA takes small pageable copies at once); overwritten by the next call."""
        self._view[:] = values
        return self._host if self._device.type == "cpu" else self._host.to(self._device, non_blocking=True)


class Courier:
    """Small tensors from the device. Of one worker; what was fetched is its own copy.

    ``Tensor.cpu`` waits for the device once per tensor. A round has one wait: for what it decided.
    """

    def __init__(self, device: torch.device):
        self._device, self._buffer, self._done = device, torch.empty(0), None

    def fetch(self, *tensors: Tensor) -> list[Tensor]:
        """int64 tensors on the host: gathered on the device, copied to pinned memory, waited for once."""
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
    """This thread's work on a stream of its own: two workers of one process and one GPU overlap.

    Args: priority: ``high`` gets free multiprocessors before ``normal``.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device, -1 if priority == "high" else 0)):
        yield


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated on the device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def check_cache_fits(needed: int, slots: int, device: torch.device) -> None:
    """Whether a KV cache fits beside the weights.

    Args: needed: bytes of it. slots: of it, per sequence.

    Raises:
        ConfigError: it does not, and how many tokens would.
    """
    free = int(free_bytes(device) * (1 - SPARE))
    if needed > free:
        raise ConfigError(
            f"the KV cache needs {needed / 1e9:.2f} GB and {device} has {free / 1e9:.2f} GB for it; lower "
            f"engine.max_batch, or engine.max_model_len to about {slots * free // needed}"
        )
