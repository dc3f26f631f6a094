"""The measure of event loop stalls: lateness in which this process was computing."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable

import pytest

from ssd.serving.loop_watch import PERIOD_S, watch_loop
from ssd.serving.metrics import Metrics

BLOCK = b"x" * 2**16


class Enough(Exception):
    """Ends the watch."""


def compute(seconds: float) -> None:
    """Keeps a core busy for so much CPU time."""
    end_s = time.process_time() + seconds
    while time.process_time() < end_s:
        hashlib.sha256(BLOCK).digest()


async def stalls(block: Callable[[], None]) -> float:
    """Returns the longest stall that is seen while something blocks the loop."""
    seen: list[float] = []
    watching = asyncio.create_task(watch_loop(seen.append))
    await asyncio.sleep(2 * PERIOD_S)
    block()
    await asyncio.sleep(2 * PERIOD_S)
    watching.cancel()
    return max(seen)


def test_computing_on_the_loop_is_a_stall() -> None:
    assert 0.2 - PERIOD_S <= asyncio.run(stalls(lambda: compute(0.2))) < 5.0


def test_time_that_others_had_the_core_is_none() -> None:
    """Sleeping stands for a process that the system does not run."""
    assert asyncio.run(stalls(lambda: time.sleep(0.3))) < 0.1


@pytest.mark.parametrize(
    ("late_s", "used_s", "expected"), [(0.5, 0.6, 0.5), (0.5, 0.1, 0.1), (0.0, 0.6, 0.0), (-0.01, 0.6, 0.0)]
)
def test_a_look(late_s: float, used_s: float, expected: float) -> None:
    times, cpu = iter([10.0, 10.0 + PERIOD_S + late_s, 0.0]), iter([3.0, 3.0 + used_s, 0.0])
    seen: list[float] = []

    def take(stall: float) -> None:
        seen.append(stall)
        raise Enough

    with pytest.raises(Enough):
        asyncio.run(watch_loop(take, clock=times.__next__, used=cpu.__next__))
    assert seen == [pytest.approx(expected)]


def test_it_is_a_metric() -> None:
    metrics = Metrics()
    metrics.stalls.observe(0.2)
    values = metrics.values
    assert values['ssd:event_loop_stall_seconds_bucket{le="0.1"}'] == 0
    assert values["ssd:event_loop_stall_seconds_count"] == 1
