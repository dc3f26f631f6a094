"""What a round decided, for the front and for the draft. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..decoding.verify import Outcome
from .sequence import Commit


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a round decided."""

    outcome: Outcome
    states: Tensor
    """``[B]`` int64 of ``RowState``: for the draft."""
    commits: list[Commit]
    forward_s: float
