"""Watches how long an event loop is kept from its other clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PERIOD_S = 0.02
"""Time between two looks. A stall is seen to this precision."""


async def watch_loop(
    stalled: Callable[[float], None],
    *,
    clock: Callable[[], float] = time.perf_counter,
    used: Callable[[], float] = time.process_time,
) -> None:
    """Reports stalls until cancelled.

    A stall is the time by which the loop wakes this task too late, as far as this process was computing in it. Time
    in which other processes had the cores does not count.

    Args:
        stalled: called with the seconds of every look, mostly 0.
        clock: returns monotonic seconds.
        used: returns the seconds of CPU time that this process has used.
    """
    while True:
        began_s, used_s = clock(), used()
        await asyncio.sleep(PERIOD_S)
        stalled(max(0.0, min(clock() - began_s - PERIOD_S, used() - used_s)))
