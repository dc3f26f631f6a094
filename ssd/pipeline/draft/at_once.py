"""Parallel drafts (PARD; An et al. 2025, arXiv 2504.18583): one forward gives the candidates of all depths.

The draft was trained to guess the tokens after next behind mask tokens. So the rows of all steps of a walk are run
together: the first step's with their tokens, the others' with masks. A row attends those of its own branch above it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..sampling.walk import Forward, Rows


class Steps(Protocol):
    """The steps of a walk."""

    def rows(self, step: int, nodes: Tensor) -> Rows:
        """Returns the rows of one step of branches that continue ``nodes [B, N]``."""
        ...

    def together(self, depth: int, nodes: Tensor) -> Rows:
        """Returns the rows of the first ``depth`` steps as those of one forward, step by step."""
        ...


class AtOnce:
    """The steps and the forward of one walk of a parallel draft.

    Args:
        steps: of the walk.
        forward: runs the draft.
        depth: steps that the walk takes.
        mask: the token fed for candidates that are not known yet.
    """

    def __init__(self, steps: Steps, forward: Forward, *, depth: int, mask: int):
        self._steps, self._forward, self._depth, self._mask = steps, forward, depth, mask
        self._nodes: list[Tensor] = []
        self._logits: list[Tensor] = []

    def rows(self, step: int, nodes: Tensor) -> Rows:
        """As ``Steps.rows``."""
        self._nodes = [nodes]
        return self._steps.rows(step, nodes)

    def forward(self, rows: Rows, tokens: Tensor) -> Tensor:
        """Returns logits ``[B, R, V]``. Those of all steps are computed at the first one; what is fed later is
        ignored. Rows that are none of the steps' (the tree under verification) are run as they are."""
        if not self._nodes:
            return self._forward(rows, tokens)
        if not self._logits:
            masks = torch.full_like(tokens, self._mask).repeat(1, self._depth - 1)
            fed = torch.cat([tokens, masks], dim=1)
            logits = self._forward(self._steps.together(self._depth, self._nodes[0]), fed)
            self._logits = list(logits.split(tokens.shape[1], dim=1))
        return self._logits[rows.step]
