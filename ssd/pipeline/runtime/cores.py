"""CPU cores and compute threads of a worker."""

from __future__ import annotations

import contextlib
import gc
import os
import threading

import torch

from ...errors import ConfigError


def usable_cores(cores: list[int] | None) -> list[int] | None:
    """Returns those of the wanted cores that this process may use; None if none are wanted.

    Raises:
        ConfigError: this process may use none of them.
    """
    if cores is None or not hasattr(os, "sched_setaffinity"):
        return None
    available = os.sched_getaffinity(0)
    # A machine with a single core still runs the shipped configurations, just not in parallel.
    usable = [core for core in cores if core in available] or (sorted(available) if len(available) == 1 else [])
    if not usable:
        raise ConfigError(f"cores {cores} are not available to this process; it may use {sorted(available)}")
    return usable


def set_threads(cores: list[int] | None, workers: int) -> None:
    """Sets one compute thread per core.

    Without cores, a worker takes its share of the machine's: all workers compute at the same time, and threads that
    outnumber the cores spin against each other.
    """
    torch.set_num_threads(len(cores) if cores else max(1, (os.cpu_count() or 2) // max(2, workers)))


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
