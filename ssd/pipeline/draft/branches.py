"""The steps that advance all branches of a draft's tree, as row plans."""

from __future__ import annotations

import torch
from torch import Tensor

from ...decoding.trees.shape import TreeShape
from ...models.rows import RowPlan
from ...models.runner import Layout


class BranchSteps:
    """The K steps of all N branches. Step s feeds every branch its s-th token.

    A branch that continues node u attends the main slots of u's chain part, u's scratch slot if
    u is a leaf off the chain, and the branch's own earlier steps. Scratch slots: leaves of the
    tree first (as ``RowPlan.tree`` places them), then N for each step. Which nodes the branches
    continue is data: shapes, and compiled code, are the same in every round.
    """

    def __init__(self, shape: TreeShape, budget: int, device: torch.device):
        self._chain, self._leaves = shape.depth + 1, shape.nodes - shape.depth - 1
        self._depths = shape.depth_index(device)
        slots, deepest = self._leaves + budget * shape.depth, shape.depth
        self._slots = torch.arange(slots, device=device)
        own = torch.zeros(deepest, budget, slots, dtype=torch.bool)
        for step in range(deepest):
            for earlier in range(step):
                start = self._leaves + earlier * budget
                own[step, :, start : start + budget] = torch.eye(budget, dtype=torch.bool)
        self._own = own.to(device)
        self.plans = [
            RowPlan(
                name=f"branch {step}",
                offsets=(deepest + 1 + step,) * budget,
                limits=(deepest + 1,) * budget,
                in_place=0,
                scratch_start=self._leaves + step * budget,
                scratch_mask=tuple(tuple(row) for row in own[step].tolist()),
            )
            for step in range(deepest)
        ]
        self._places = [
            torch.arange(plan.scratch_start, plan.scratch_start + budget, device=device) for plan in self.plans
        ]

    def layout(self, step: int, nodes: Tensor) -> Layout:
        """Of step ``step`` for branches that continue ``nodes [B, N]``."""
        depths, leaf = self._depths[nodes], nodes >= self._chain
        mask = self._own[step].expand(len(nodes), -1, -1)
        if self._leaves:
            mask = mask | (leaf[..., None] & (self._slots == (nodes - self._chain)[..., None]))
        # A leaf's own key stands in scratch, so main ends before its position.
        return Layout(depths + 1 + step, depths + (~leaf).long(), self._places[step], mask)


def scratch_slots(shape: TreeShape, budget: int) -> int:
    """Scratch slots the draft's cache needs per sequence."""
    return shape.nodes - shape.depth - 1 + budget * shape.depth
