"""The ranks that share one model: their process group and the lanes between them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from ...errors import PipelineError
from ...models.parallel.tensor_group import TensorGroup
from .lanes import ZmqLane
from .messages import Shutdown


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """One rank, among those that share a model."""

    group: TensorGroup
    lanes: list[ZmqLane]
    """In the first rank: to each of the others. In another rank: one, from the first."""

    def close(self) -> None:
        """Leaves the group. The first rank tells the others to leave, too."""
        for lane in self.lanes:
            if self.group.rank == 0:
                with contextlib.suppress(PipelineError):  # the rank may be gone already
                    lane.send(Shutdown(), wait=False)
            lane.close()
        self.group.close()
