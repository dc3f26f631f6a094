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
    """The memory of a process.

    Args:
        trim: As ``malloc_trim`` returns it.
        resident: Returns the resident bytes.
    """

    def __init__(self, *, trim: Callable[[int], int], resident: Callable[[], int]):
        self._trim, self._resident = trim, resident
        self._least = resident()

    @property
    def grown(self) -> bool:
        """Whether the process has grown by ``GROWN_BYTES`` since it was smallest or last trimmed."""
        resident = self._resident()
        self._least = min(self._least, resident)
        return resident >= self._least + GROWN_BYTES

    def trim(self) -> None:
        """Gives back what is free. Does not hold the interpreter's lock, but blocks for milliseconds: the time is in
        docs/serving.md."""
        self._trim(0)
        self._least = self._resident()


def own_heap() -> Heap | None:
    """Returns the memory of this process; None if the C library cannot give free memory back."""
    trim = malloc_trim()
    return None if trim is None else Heap(trim=trim, resident=resident_bytes)


def resident_bytes() -> int:
    """Returns the resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


async def keep_trim(heap: Heap | None, *, pause_s: float = LOOK_S) -> None:
    """Gives free memory back whenever the process has grown, until cancelled. Trims in a thread."""
    while heap is not None:
        await asyncio.sleep(pause_s)
        if heap.grown:
            await asyncio.to_thread(heap.trim)
