"""CPU cores and threads of a worker."""

from __future__ import annotations

import gc
import os
import threading
from typing import TYPE_CHECKING

import torch

from ...errors import ConfigError

if TYPE_CHECKING:
    pass


def usable_cores(cores: list[int] | None) -> list[int] | None:
    """Those of the wanted cores this process may use.

    Raises: ConfigError if there is none of them.
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
    """One compute thread per core. Without cores given, a worker's share of the machine's: they
    run at the same time, and threads that outnumber cores spin against each other."""
    torch.set_num_threads(len(cores) if cores else max(1, (os.cpu_count() or 2) // max(2, workers)))


def settle(cores: list[int] | None) -> None:
    """Keep this process on its cores. Once it is warm: compilers may use the whole machine."""
    if threading.current_thread() is threading.main_thread():  # a process of the worker's own
        # The libraries' and the compiler's million objects stay: no collection in mid-round looks through them.
        gc.collect()
        gc.freeze()
    if cores:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)
