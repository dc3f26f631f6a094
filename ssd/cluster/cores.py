"""Cores for the workers of replicas that may share a node."""

from __future__ import annotations

import fcntl
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..config.sections import Config


@dataclass(slots=True)
class CoreLease:
    """Exclusive cores of this node, held until ``close`` or the end of the process.

    Each core is a locked file in a folder of this user. The kernel unlocks it however the process ends.
    """

    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / f"ssd-cores-{os.getuid()}")
    _held: list[BinaryIO] = field(default_factory=list)

    def take(self, wanted: list[int] | None) -> list[int] | None:
        """Takes as many cores as ``wanted`` has, those cores themselves where they are free.

        Returns:
            The cores taken. ``wanted`` itself if too few are free: the cores are shared then, which is slower.
            None for None.
        """
        if wanted is None or not hasattr(os, "sched_getaffinity"):
            return wanted
        self.folder.mkdir(mode=0o700, exist_ok=True)
        usable = os.sched_getaffinity(0)
        order = [core for core in wanted if core in usable] + sorted(usable - set(wanted))
        taken: dict[int, BinaryIO] = {}
        for core in order:
            if len(taken) < len(wanted) and (file := self._lock(core)) is not None:
                taken[core] = file
        if len(taken) < len(wanted):
            for file in taken.values():
                file.close()
            return wanted
        self._held += taken.values()
        return sorted(taken)

    def leased(self, config: Config, *sections: str) -> Config:
        """Returns the configuration with cores of this lease in the named sections (``target``, ``draft``)."""
        changed = {}
        for name in sections:
            model = getattr(config, name)
            if model is not None:
                changed[name] = model.model_copy(update={"cores": self.take(model.cores)})
        return config.model_copy(update=changed)

    def close(self) -> None:
        """Gives all cores back."""
        while self._held:
            self._held.pop().close()

    def _lock(self, core: int) -> BinaryIO | None:
        file = (self.folder / str(core)).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        return file
