"""Gives memory that the C library keeps back to the system.

A thread that tokenizes a megabyte of text needs more than a hundred MiB for a moment. glibc keeps them for the thread
when they are freed, so a server would hold that much for each of its threads for ever.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

import psutil

LOOK_S = 2.0
"""Time between two looks."""
GROWN_BYTES = 64 * 2**20
"""Growth of the resident memory since the last return that is worth another one."""


def malloc_trim() -> Callable[[int], int] | None:
    """Returns glibc's function that gives free memory back; None if the C library has none."""
    found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if found is not None:
        found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
    return found


class Heap:
    """The memory of this process.

    Args:
        trim: as ``malloc_trim`` returns it.
    """

    def __init__(self, trim: Callable[[int], int]):
        self._trim, self._process = trim, psutil.Process()
        self._least = self.resident

    @property
    def resident(self) -> int:
        """Bytes."""
        return int(self._process.memory_info().rss)

    @property
    def grown(self) -> bool:
        """Whether the process has grown by ``GROWN_BYTES`` since it was smallest or last trimmed."""
        self._least = min(self._least, self.resident)
        return self.resident >= self._least + GROWN_BYTES

    def trim(self) -> None:
        """Gives back what is free. Takes some milliseconds, without the interpreter's lock."""
        self._trim(0)
        self._least = self.resident


async def keep_trim(pause_s: float = LOOK_S) -> None:
    """Gives free memory back whenever the process has grown, until cancelled."""
    trim = malloc_trim()
    if trim is None:
        return
    heap = Heap(trim)
    while True:
        await asyncio.sleep(pause_s)
        if heap.grown:
            await asyncio.to_thread(heap.trim)
