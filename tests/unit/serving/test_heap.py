"""Memory that a heavy request took for a moment goes back to the system."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from ssd.serving.heap import GROWN_BYTES, Heap, keep_trim, malloc_trim

START = 100 * GROWN_BYTES
PHASE = """
import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from ssd.serving.heap import own_heap, resident_bytes

heap, together, kept = own_heap(), Barrier(4), []

def work():
    together.wait()
    pieces = [bytes(3000) for _ in range(40_000)]
    kept.append(bytes(3000))  # the last piece, which keeps the thread's heap from shrinking by itself

def measure():
    return resident_bytes() - before, heap.grown

before = resident_bytes()
with ThreadPoolExecutor(4) as threads:
    for done in [threads.submit(work) for _ in range(4)]:
        done.result()
grown = measure()
heap.trim()
print(json.dumps([grown, measure()]))
"""


class Process:
    """A process whose size the test sets."""

    def __init__(self, *, trimmed: int = START):
        self.resident, self.trimmed = START, trimmed
        self.threads: list[threading.Thread] = []
        """Those that trimmed."""

    def heap(self) -> Heap:
        return Heap(trim=self.trim, resident=lambda: self.resident)

    def trim(self, pad: int) -> int:
        assert pad == 0
        self.threads.append(threading.current_thread())
        self.resident = self.trimmed
        return 1


def test_growth_counts_from_the_smallest_size() -> None:
    process = Process()
    heap = process.heap()
    process.resident += GROWN_BYTES - 1
    assert not heap.grown
    process.resident += 1
    assert heap.grown
    process.resident = START - GROWN_BYTES
    assert not heap.grown
    process.resident = START
    assert heap.grown


def test_growth_counts_from_the_last_trim() -> None:
    process = Process(trimmed=START + GROWN_BYTES)
    heap = process.heap()
    process.resident += 2 * GROWN_BYTES
    assert heap.grown
    heap.trim()  # half of the memory is in use and stays
    assert not heap.grown
    process.resident += GROWN_BYTES
    assert heap.grown


async def looks(process: Process, sizes: Iterator[int]) -> None:
    """Lets the trimmer look at each size at least once."""
    trimming = asyncio.create_task(keep_trim(process.heap(), pause_s=0))
    for size in sizes:
        process.resident = START + size
        for _ in range(3):
            await asyncio.sleep(0)
        while size >= GROWN_BYTES and process.resident != process.trimmed and not trimming.done():
            await asyncio.sleep(0)
    trimming.cancel()


def test_it_trims_whenever_the_process_has_grown() -> None:
    process = Process()
    asyncio.run(looks(process, iter((0, GROWN_BYTES - 1, GROWN_BYTES, 1, 3 * GROWN_BYTES, 5))))
    assert len(process.threads) == 2


def test_it_trims_beside_the_event_loop() -> None:
    process = Process()
    asyncio.run(looks(process, iter((GROWN_BYTES,))))
    assert process.threads and threading.current_thread() not in process.threads


def test_a_library_that_cannot_trim_is_left_alone() -> None:
    asyncio.run(asyncio.wait_for(keep_trim(None), 10))


@pytest.mark.skipif(malloc_trim() is None, reason="the C library keeps no such memory, or cannot give it back")
def test_memory_that_threads_kept_goes_back() -> None:
    """Measures in a process without threads or free memory of other tests."""
    done = subprocess.run([sys.executable, "-c", PHASE], capture_output=True, text=True, check=True)
    (kept, grown), (left, grown_then) = json.loads(done.stdout)
    assert kept > 4 * GROWN_BYTES and grown
    assert left < GROWN_BYTES and not grown_then
