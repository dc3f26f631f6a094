"""Memory that a heavy request took for a moment goes back to the system."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from ssd.serving import heap
from ssd.serving.heap import GROWN_BYTES, Heap, keep_trim, malloc_trim

SOON_S = 20.0
SCRIPT = """
import asyncio, json, sys
from test_heap import grown_by

print(json.dumps(asyncio.run(grown_by(trimming=sys.argv[1] == "yes"))))
"""


async def grown_by(*, trimming: bool) -> list[int]:
    """Returns by how many bytes a process has grown after each of several heavy phases in threads."""
    process, sizes = psutil.Process(), []
    trimmer = asyncio.create_task(keep_trim(0.05)) if trimming else None
    await asyncio.sleep(0)  # the trimmer has taken its first look
    before = process.memory_info().rss
    kept: list[bytes] = []

    def work() -> None:
        for size in (1000, 3000):
            pieces = [bytes(size) for _ in range(40_000)]
            kept.append(bytes(size))  # small, and keeps the thread's heap from shrinking by itself
            del pieces

    for _ in range(3):
        with ThreadPoolExecutor(4) as threads:
            await asyncio.gather(*(asyncio.get_running_loop().run_in_executor(threads, work) for _ in range(4)))
        until = time.monotonic() + (SOON_S if trimming else 0.0)
        while process.memory_info().rss - before >= GROWN_BYTES and time.monotonic() < until:
            await asyncio.sleep(0.05)
        sizes.append(process.memory_info().rss - before)
    if trimmer is not None:
        trimmer.cancel()
    return sizes


def sizes(trimming: str) -> list[int]:
    """Measures in a process without threads or free memory of other tests."""
    folder = __file__.rpartition("/")[0]
    code = f"import sys; sys.path.insert(0, {folder!r})\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", code, trimming], capture_output=True, text=True, check=True)
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(malloc_trim() is None, reason="the C library keeps no such memory, or cannot give it back")
def test_memory_of_heavy_phases_goes_back() -> None:
    assert max(sizes("no")) > GROWN_BYTES  # what the library keeps without us
    assert max(sizes("yes")) < GROWN_BYTES


def test_only_growth_is_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    resident = 100 * GROWN_BYTES
    monkeypatch.setattr(heap.Heap, "resident", property(lambda _self: resident))
    watched = Heap(lambda pad: trimmed.append(pad) or 0)
    resident += GROWN_BYTES - 1
    assert not watched.grown
    resident += 1
    assert watched.grown
    watched.trim()
    assert not watched.grown and trimmed == [0]
    resident -= GROWN_BYTES
    assert not watched.grown
    resident += GROWN_BYTES
    assert watched.grown
