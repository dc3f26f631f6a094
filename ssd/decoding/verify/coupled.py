"""Verification: candidate tree + the target's choice after every node → outcome.

Coupled rule: draft and target choose with the same noise, so a candidate is accepted iff it
*is* the target's token. No probability is compared and none crosses the link; the emitted
tokens are the target's own for the seed, whatever was drafted (Gumbel coupling: Daliri, Musco,
Suresh 2024, arXiv 2408.07978; trees by matching: DESIGN.md, idea 3).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..trees.shape import ABSENT


class Outcome(NamedTuple):
    """What a round decided, per sequence ``[B]`` int64."""

    node: Tensor
    """u, the deepest accepted node (0: none accepted)."""
    bonus: Tensor
    """t, the target's own token after u."""


def verify_coupled(tokens: Tensor, chosen: Tensor, parents: Tensor, depths: Tensor, ancestors: Tensor) -> Outcome:
    """Accept the longest matching path.

    Args:
        tokens: ``[B, W]`` int64, node tokens; column 0 is the root and is taken as accepted.
            ``ABSENT`` never matches.
        chosen: ``[B, W]`` int64, the target's token after each node.
        parents: ``[W]`` int64, ``depths``: ``[W]`` int64, ``ancestors``: ``[W, W]`` bool, of the
            tree shape.

    Siblings must differ in token, then at most one child of a node matches and the outcome is
    unique; if they do not, the first deepest node wins, with the same tokens emitted.
    """
    matches = (tokens == chosen[:, parents]) & (tokens != ABSENT)
    matches[:, 0] = True
    # A node is accepted iff nothing on its path fails to match.
    failed_above = ((~matches)[:, None, :] & ancestors).any(-1)
    node = (depths * ~failed_above).argmax(-1)
    return Outcome(node, chosen.gather(1, node[:, None]).squeeze(1))
