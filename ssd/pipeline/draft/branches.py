"""The forwards of a tree's walk: the tree under verification, and the steps that advance all its branches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...decoding.forecast.base import Forecast
from ...decoding.trees.shape import TreeShape
from ...models.rows import Layout, RowPlan
from ..sampling.walk import Frontier, Rows, Walk, after


class BranchSteps:
    """The K steps of all N branches. Step s feeds every branch its s-th token.

    A branch that continues node u attends the main slots of u's chain part, u's scratch slot if u is a leaf off the
    chain, and the branch's own earlier steps. Scratch slots are the leaves of the tree first (as ``RowPlan.tree``
    places them), then N for each step. The nodes that branches continue are data, so that shapes and compiled code are
    the same in every round.
    """

    def __init__(self, shape: TreeShape, budget: int, device: torch.device):
        self.glue = RowPlan.tree("glue", shape)
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
        self._joined: dict[int, RowPlan] = {}
        self._places = [
            torch.arange(plan.scratch_start, plan.scratch_start + budget, device=device) for plan in self.plans
        ]

    def tree(self, batch: int) -> Rows:
        """Returns the rows of the trees under verification."""
        return Rows(self.glue, 0, self._depths.expand(batch, -1), in_tree=True)

    def together(self, depth: int, nodes: Tensor) -> Rows:
        """Returns the rows of the first ``depth`` steps as those of one forward, step by step."""
        steps = [self.rows(step, nodes) for step in range(depth)]
        layouts = [step.layout for step in steps if step.layout is not None]
        plan = self._joined.setdefault(depth, _joined(self.plans[:depth]))
        ahead = torch.cat([one.offsets for one in layouts], dim=1)
        limits, places = torch.cat([one.limits for one in layouts], dim=1), torch.cat(self._places[:depth])
        masks = [one.mask for one in layouts if one.mask is not None]
        return Rows(plan, 0, ahead, Layout(ahead, limits, places, torch.cat(masks, dim=1)))

    def rows(self, step: int, nodes: Tensor) -> Rows:
        """Returns the rows of one step of branches that continue ``nodes [B, N]``."""
        depths, leaf = self._depths[nodes], nodes >= self._chain
        mask = self._own[step].expand(len(nodes), -1, -1)
        if self._leaves:
            mask = mask | (leaf[..., None] & (self._slots == (nodes - self._chain)[..., None]))
        # A leaf's own key is in scratch, so main ends before its position.
        ahead, limits = depths + 1 + step, depths + (~leaf).long()
        return Rows(self.plans[step], step, ahead, Layout(ahead, limits, self._places[step], mask))


def _joined(plans: Sequence[RowPlan]) -> RowPlan:
    """Returns the plan of one forward with the rows of several steps."""
    masks = [plan.scratch_mask for plan in plans if plan.scratch_mask is not None]
    return RowPlan(
        name=f"branches {len(plans)}",
        offsets=tuple(offset for plan in plans for offset in plan.offsets),
        limits=tuple(limit for plan in plans for limit in plan.limits),
        in_place=0,
        scratch_start=plans[0].scratch_start,
        scratch_mask=tuple(row for mask in masks for row in mask),
    )


def branched(walk: Walk, steps: BranchSteps, forecast: Forecast, tokens: Tensor) -> Frontier:
    """Runs the draft over the trees under verification ``tokens [B, W]``. Returns the frontier of branches for the
    outcomes of the forecast: each continues a node and feeds its guess of the bonus token."""
    rows, source = steps.tree(len(tokens)), walk.source
    endings, paths = walk.endings(tokens), walk.scorer.paths(tokens)
    scores, noiseless = walk.scorer.outcomes(walk.logits(rows, tokens, endings), rows, paths)
    nodes, guesses = forecast.outcomes(scores, tokens, noiseless)
    if source is not None and endings is not None:
        endings = source.continued(endings, nodes)
    if paths is not None:
        paths = paths.gather(1, nodes[..., None].expand(-1, -1, paths.shape[2]))
    return after(Frontier(guesses, nodes, endings, paths), guesses, source)


def scratch_slots(shape: TreeShape, budget: int) -> int:
    """Returns the scratch slots per sequence that the draft's cache needs for N = ``budget`` branches."""
    return shape.nodes - shape.depth - 1 + budget * shape.depth
