"""The lookup that both sides do after an exchange: was the real outcome among the prepared ones?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...decoding.trees.shape import ABSENT
from ...decoding.verify.draft_probs import DraftProbs
from .frames import SpeculationSet


class Found(NamedTuple):
    """The result of a lookup, per slot."""

    trees: list[list[int]]
    """``[B][W]``, the next round's: the bonus token at the root; below it ``ABSENT`` on a miss."""
    branches: list[int | None]
    """The branch that was prepared for the outcome; None on a miss."""
    prepared: list[bool]
    """Whether any branch was prepared for this slot."""
    draft: DraftProbs | None
    """``[B, N, I, m]``, what the trees of all branches were drawn from, under rules that need it."""

    def drawn_from(self, slot: int) -> DraftProbs | None:
        """``[I, m]`` of the slot's tree; None where there is none or the rule does not need it."""
        branch = self.branches[slot]
        return None if self.draft is None or branch is None else self.draft[slot, branch]


def lookup(nodes: Sequence[int], bonus: Sequence[int], speculation: SpeculationSet) -> Found:
    """Find the speculation for each outcome.

    Args:
        nodes: ``[B]``, the deepest accepted node u of each slot.
        bonus: ``[B]``, the bonus token t.
    """
    found = Found([], [], [], speculation.draft)
    absent = [ABSENT] * speculation.trees.shape[2]
    outcomes = zip(speculation.nodes.tolist(), speculation.guesses.tolist(), strict=True)
    for slot, (u, t, (at, guessed)) in enumerate(zip(nodes, bonus, outcomes, strict=True)):
        branch = next((n for n, outcome in enumerate(zip(at, guessed, strict=True)) if outcome == (u, t)), None)
        found.trees.append([t, *(absent if branch is None else speculation.trees[slot, branch].tolist())])
        found.branches.append(branch)
        found.prepared.append(guessed.count(ABSENT) < len(guessed))
    return found
