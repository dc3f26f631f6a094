"""Which cores a replica's workers take, where several replicas may share a node."""

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
    """Cores of this node that nobody else who asks here has, kept until ``close`` or the process ends.

    A core is a locked file in a folder of this user's; the kernel unlocks it whoever dies how.
    """

    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / f"ssd-cores-{os.getuid()}")
    _held: list[BinaryIO] = field(default_factory=list)

    def take(self, wanted: list[int] | None) -> list[int] | None:
        """As many cores as wanted, those themselves where they are free. If too few are free the
        wanted ones are shared: slower, but it works. None stays None."""
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
        """The configuration with cores of this lease for ``target`` and ``draft``, whichever are named."""
        changed = {}
        for name in sections:
            model = getattr(config, name)
            if model is not None:
                changed[name] = model.model_copy(update={"cores": self.take(model.cores)})
        return config.model_copy(update=changed)

    def close(self) -> None:
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
