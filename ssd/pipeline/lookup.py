"""The lookup both sides do after an exchange: was the real outcome among the prepared ones?"""

from __future__ import annotations

import numpy as np
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
    hit, branch = _found(nodes, bonus, speculation)
    trees = np.empty((len(hit), speculation.trees.shape[2] + 1), dtype=np.int64)
    trees[:, 0] = bonus.numpy()
    trees[:, 1:] = speculation.trees.numpy()[np.arange(len(hit)), branch]
    trees[~hit, 1:] = ABSENT
    return torch.from_numpy(trees), torch.from_numpy(hit)


def found_branch(nodes: Tensor, bonus: Tensor, speculation: SpeculationSet) -> tuple[Tensor, Tensor]:
    """Who hit ``[B]`` bool, and the branch that did ``[B]`` int64. Arguments as for :func:`lookup`."""
    hit, branch = _found(nodes, bonus, speculation)
    return torch.from_numpy(hit), torch.from_numpy(branch)


def _found(nodes: Tensor, bonus: Tensor, speculation: SpeculationSet) -> tuple[np.ndarray, np.ndarray]:
    # Numpy: on the critical path of every round, where torch's cost per call counts.
    matches = (speculation.nodes.numpy() == nodes.numpy()[:, None]) & (
        speculation.guesses.numpy() == bonus.numpy()[:, None]
    )
    return matches.any(1), matches.argmax(1)
