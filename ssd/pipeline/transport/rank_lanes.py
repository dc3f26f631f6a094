"""The ranks that share one model: their process group and the lanes between them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from ...errors import PipelineError
from ...models.tensor_group import TensorGroup
from .lanes import ZmqLane
from .messages import Shutdown


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """One rank's place among those that share a model."""

    group: TensorGroup
    lanes: list[ZmqLane]
    """Of the first rank: to each of the others. Of another: from the first."""

    def close(self) -> None:
        """The first rank sends the others home."""
        for lane in self.lanes:
            if self.group.rank == 0:
                with contextlib.suppress(PipelineError):  # it may be gone already
                    lane.send(Shutdown(), wait=False)
            lane.close()
        self.group.close()
