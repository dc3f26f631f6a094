"""CPU cores and compute threads of a worker."""

from __future__ import annotations

import contextlib
import gc
import os
import threading

import torch

from ...config.machine import core_count


def set_threads(cores: list[int] | None, workers: int) -> None:
    """Sets one compute thread per core.

    Without cores, a worker takes its share of those this process may use: all workers compute at the same time, and
    threads that outnumber the cores spin against each other.
    """
    torch.set_num_threads(len(cores) if cores else max(1, core_count() // max(2, workers)))


def settle(cores: list[int] | None) -> None:
    """Pins this process to its cores. Called once it is warm: compilers may use the whole machine."""
    if threading.current_thread() is threading.main_thread():  # the process belongs to one worker
        # The million objects of libraries and compiler stay, so that no collection looks through them in mid-round.
        gc.collect()
        gc.freeze()
    if cores:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # a compiler's thread that has just ended
                os.sched_setaffinity(int(thread), cores)
