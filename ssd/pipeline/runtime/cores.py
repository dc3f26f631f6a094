"""CPU cores and compute threads of a worker."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
from pathlib import Path

import torch

from ...errors import ConfigError

log = logging.getLogger(__name__)


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
        raise ConfigError(
            f"cores {cores} are not available to this process, which may use {sorted(available)}: choose from them, "
            "or null for any (target.cores, draft.cores)"
        )
    if len(usable) < len(cores) and len(available) > 1:
        missing = sorted({*cores} - available)
        log.warning("cores %s are not available to this process; using %s of %s", missing, usable, cores)
    return usable


def set_threads(cores: list[int] | None, workers: int) -> None:
    """Sets one compute thread per core.

    Without cores, a worker takes its share of those this process may use: all workers compute at the same time, and
    threads that outnumber the cores spin against each other.
    """
    torch.set_num_threads(len(cores) if cores else max(1, core_count() // max(2, workers)))


def core_count(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Returns how many cores this process may keep busy, by its affinity and the quotas of its control groups.

    Args:
        groups: where control groups are mounted, version 1 or 2.
        membership: the file that names this process's groups.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(int, _quotas(groups, membership))]))


def _quotas(groups: Path, membership: Path) -> list[float]:
    """Returns the limits on CPU time, in cores, of this process's control groups and of the groups around them."""
    found: list[float] = []
    with contextlib.suppress(OSError, ValueError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = groups / "cpu" if controllers else groups
            own = root / path.lstrip("/")
            # In a container the path may be the host's, while the root is the container's own group.
            for folder in {root, own, *(parent for parent in own.parents if parent.is_relative_to(root))}:
                found += _quota(folder)
    return found


def _quota(folder: Path) -> list[float]:
    """Returns a control group's limit in cores, in a list that is empty without a limit."""
    with contextlib.suppress(OSError, ValueError):  # no such file: no limit here
        quota, period = (folder / "cpu.max").read_text().split()
        return [] if quota == "max" else [int(quota) / int(period)]
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        return [] if quota_us < 0 else [quota_us / int((folder / "cpu.cfs_period_us").read_text())]
    return []


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
