"""Who speculates in a round, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Arm = Literal["ssd", "sd", "ngram", "none"]
"""A way of decoding: prepared speculations, drafts on demand, candidates from the text itself, or plainly."""


@dataclass(frozen=True, slots=True)
class Roles:
    """Decided once, at the top of a round, and valid until its end."""

    arms: tuple[Arm, ...]
    """``[B]``; ``none`` in empty slots."""

    def speculates(self, slot: int) -> bool:
        """Whether the draft takes part in this slot's decoding."""
        return self.arms[slot] in ("ssd", "sd")

    def forecasts(self, slot: int) -> bool:
        """Whether the draft prepares for this slot's outcomes."""
        return self.arms[slot] == "ssd"
