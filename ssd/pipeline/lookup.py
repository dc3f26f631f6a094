"""The lookup both sides do after an exchange: was the real outcome among the prepared ones?"""

from __future__ import annotations

import torch
from torch import Tensor

from ..decoding.tree import ABSENT
from .frames import SpeculationSet


def lookup(nodes: Tensor, bonus: Tensor, speculation: SpeculationSet) -> tuple[Tensor, Tensor]:
    """The next round's trees and who hit.

    Args:
        nodes, bonus: ``[B]`` int64, the outcome (u, t).

    Returns:
        trees ``[B, W]`` (root = bonus, candidates ``ABSENT`` on a miss) and hit ``[B]`` bool.
    """
    hit, branch = found_branch(nodes, bonus, speculation)
    found = speculation.trees[torch.arange(len(nodes)), branch]
    return torch.cat([bonus[:, None], found.masked_fill(~hit[:, None], ABSENT)], dim=1), hit


def found_branch(nodes: Tensor, bonus: Tensor, speculation: SpeculationSet) -> tuple[Tensor, Tensor]:
    """Who hit ``[B]`` bool, and the branch that did ``[B]`` int64. Arguments as for :func:`lookup`."""
    matches = (speculation.nodes == nodes[:, None]) & (speculation.guesses == bonus[:, None])
    return matches.any(1), matches.long().argmax(1)
