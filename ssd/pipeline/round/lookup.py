"""The lookup both sides do after an exchange: was the real outcome among the prepared ones?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...decoding.trees.shape import ABSENT
from .frames import SpeculationSet


class Found(NamedTuple):
    """Per sequence."""

    trees: list[list[int]]
    """``[B][W]``, the next round's: the bonus token at the root; below it ``ABSENT`` on a miss."""
    branches: list[int | None]
    """Which branch was prepared for the outcome; None: none was, a miss."""
    prepared: list[bool]
    """Whether any branch was prepared."""


def lookup(nodes: Sequence[int], bonus: Sequence[int], speculation: SpeculationSet) -> Found:
    """Args: nodes, bonus: ``[B]``, the outcome (u, t)."""
    found, absent = Found([], [], []), [ABSENT] * speculation.trees.shape[2]
    plans = zip(speculation.nodes.tolist(), speculation.guesses.tolist(), strict=True)
    for slot, (u, t, (at, guessed)) in enumerate(zip(nodes, bonus, plans, strict=True)):
        outcomes = enumerate(zip(at, guessed, strict=True))
        branch = next((n for n, outcome in outcomes if outcome == (u, t)), None)
        found.trees.append([t, *(absent if branch is None else speculation.trees[slot, branch].tolist())])
        found.branches.append(branch)
        found.prepared.append(guessed.count(ABSENT) < len(guessed))
    return found
