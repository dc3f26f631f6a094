"""What this machine offers to a process: cores to keep busy, folders for sockets and for caches."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import stat
import tempfile
from pathlib import Path

from ..errors import ConfigError, PipelineError

WAITING = frozenset({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"})
"""Variables that say how OpenMP's threads wait."""
SOCKET_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
"""Where sockets go if the path of the temporary folder is too long for them."""
MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket's path."""
SOCKET_NAME = 48
"""Bytes to leave for folders and names below a folder of sockets."""

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


def socket_folder(prefix: str, within: str | None = None) -> tempfile.TemporaryDirectory[str]:
    """Makes a folder for sockets that only this user may enter: in the temporary folder, or in a shorter one if its
    path is too long for sockets.

    Args:
        within: a folder of sockets to make it in instead.

    Raises:
        PipelineError: none can be made.
    """
    if within is not None:
        return tempfile.TemporaryDirectory(prefix=prefix, dir=within)
    for parent in (None, *SOCKET_FOLDERS):
        with contextlib.suppress(OSError):
            folder = tempfile.TemporaryDirectory(prefix=prefix, dir=parent)
            if len(folder.name.encode()) + SOCKET_NAME <= MAX_SOCKET_PATH:
                return folder
            folder.cleanup()
    raise PipelineError("no folder for sockets can be made: set TMPDIR to a writable folder with a short path")


def worker_environment() -> dict[str, str]:
    """Returns the environment of a worker process: this process's, completed.

    Threads that wait for others sleep, unless the user says how they wait. By default they spin, and on cores that
    other programs use too, plain decoding on two cores is then many times slower.

    Libraries that keep caches ask for the user's name and home, which a container's arbitrary user may not have: the
    name becomes ``uid-N``, and the home a private folder in the temporary one, which later starts find again.
    """
    environment, user = dict(os.environ), f"uid-{os.getuid()}"
    if not environment.keys() & WAITING:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        getpass.getuser()
    except (KeyError, OSError):
        environment["USER"] = user
    try:
        Path.home()
    except RuntimeError:
        home = Path(tempfile.gettempdir(), f"ssd-home-{user}")
        with contextlib.suppress(FileExistsError):
            home.mkdir(mode=0o700)
        status = home.lstat()
        # Compiled code is loaded from there, so nobody else may have made it.
        if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o022:
            home = Path(tempfile.mkdtemp(prefix="ssd-home-"))
        environment["HOME"] = str(home)
    return environment
