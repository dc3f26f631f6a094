"""Forecast by measurement: the budget goes where outcomes were seen to fall.

Two chances are estimated while decoding: that a node is accepted once its parent is, which gives the chance ``w_u``
that u is the deepest accepted node; and the chance ``m(r)`` that the target's token after it is the draft's guess of
rank r. An outcome (u, rank r) is worth ``w_u · m(r)``, and the N most valuable ones are prepared: the greedy
allocation by marginal gain, optimal since ``m`` falls with r. A node may get no branch.

Ranks beyond a node's fan-out are not observed: the outcome was missed, wherever it stood. So hazards are
counted: how often a guess was right, out of the times it was prepared and no better one was right (Kaplan and
Meier 1958). Estimates are kept by state: whether the last round hit, and how hot the row samples.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from ..averages import DecayingRatio
from ..trees.shape import ABSENT, TreeShape
from .base import CONSIDERED_RANKS, Forecast, exclude_children, fan_out

MEMORY = 512
"""Rounds of a state after which an observation has lost 1 - 1/e of its weight."""
PRIOR_WEIGHT = 8.0
"""Number of observations that the priors count as."""
ACCEPTS = 0.6
"""Prior chance that a chain node is accepted once its parent is. For a sibling it is a quarter of the rest."""
INNER_HAZARDS = (0.42, 0.30, 0.24, 0.2)
"""Prior hazards by rank after a node whose children were rejected; the last one holds for all further ranks."""
LEAF_HAZARDS = (0.66, 0.42, 0.32, 0.25)
"""The same after a node without children."""
HEATS = (0.0, 0.5, 1.0)
"""Upper ends of the temperature buckets; a last bucket holds everything hotter."""
PLAN_EVERY = 8
"""Rounds of a state between two allocations."""


def _estimate(prior: float) -> DecayingRatio:
    return DecayingRatio(MEMORY, top=PRIOR_WEIGHT * prior, bottom=PRIOR_WEIGHT)


def _chance(estimate: DecayingRatio) -> float:
    return estimate.top / estimate.bottom


class OutcomeCurves:
    """Estimates of where outcomes fall, for one state.

    Args:
        shape: the tree that is verified.
        ranks: guesses of a node that are ever prepared.
    """

    def __init__(self, shape: TreeShape, ranks: int):
        self._shape, self._depths, chain = shape, shape.depths, set(shape.chain)
        self._accepts = [_estimate(ACCEPTS if node in chain else (1 - ACCEPTS) / 4) for node in range(shape.nodes)]
        curves = (INNER_HAZARDS, LEAF_HAZARDS)
        self._hazards = [[_estimate(curve[min(r, len(curve) - 1)]) for r in range(ranks)] for curve in curves]
        self._plans: dict[int, list[tuple[int, int]]] = {}
        self._since = 0

    def learn(self, node: int, *, deepest: int, fan_out: int, rank: int | None) -> None:
        """Counts the outcome of a round.

        Args:
            node: u.
            deepest: depth of the tree that was verified.
            fan_out: guesses prepared after u.
            rank: rank of the right guess, if it was among them.
        """
        shape = self._shape
        path = (0, *shape.path(node))
        for at in path:
            for child in shape.children(at):
                if shape.depths[child] <= deepest:
                    self._accepts[child].observe(float(child in path))
        hazards = self._hazards[shape.depths[node] == deepest]
        for place in range(fan_out if rank is None else rank + 1):
            hazards[place].observe(float(place == rank))
        self._since += 1
        if self._since >= PLAN_EVERY:
            self._plans.clear()
            self._since = 0

    def weights(self, deepest: int) -> list[float]:
        """Returns ``w_u`` of every node ``[W]`` of a tree of depth ``deepest``."""
        shape, reach, weights = self._shape, [1.0] + [0.0] * (self._shape.nodes - 1), [0.0] * self._shape.nodes
        for node in sorted(range(shape.nodes), key=lambda n: shape.depths[n]):
            left = 1.0
            for child in shape.children(node):
                if shape.depths[child] <= deepest:
                    chance = _chance(self._accepts[child])
                    reach[child] = reach[node] * chance
                    left -= chance
            weights[node] = reach[node] * max(left, 0.0)
        return weights

    def plan(self, budget: int, deepest: int) -> list[tuple[int, int]]:
        """Returns the ``budget`` most valuable (node, rank) of a tree of depth ``deepest``: no pair twice, and no gaps
        in a node's ranks."""
        if deepest not in self._plans:
            hazards = [[_chance(estimate) for estimate in kind] for kind in self._hazards]
            curves = [
                hazards[depth == deepest] if depth <= deepest else [0.0] * len(hazards[0]) for depth in self._depths
            ]
            # Entries: value of a node's next guess, and the chance that none of its guesses before is right.
            heap = [
                (-w * curve[0], node, 0, w)
                for node, (w, curve) in enumerate(zip(self.weights(deepest), curves, strict=True))
            ]
            heapq.heapify(heap)
            found = self._plans[deepest] = []
            while len(found) < budget:
                _, node, rank, left = heapq.heappop(heap)
                found.append((node, rank))
                if rank + 1 < len(curves[node]):
                    left *= 1 - curves[node][rank]
                    heapq.heappush(heap, (-left * curves[node][rank + 1], node, rank + 1, left))
        return self._plans[deepest]


class MeasuredForecast(Forecast):
    """Prepares the N outcomes with the highest estimated value, and learns from every round.

    Args:
        shape: the tree that is verified.
        budget: N.
        batch: B slots, each in a state of its own.
        device: where outcomes are computed.
    """

    by_row = False

    def __init__(self, shape: TreeShape, budget: int, batch: int, device: torch.device | str = "cpu"):
        self.budget, self.fan_out = budget, fan_out(shape, budget, kind="uniform")
        self._shape, self._ranks = shape, max(CONSIDERED_RANKS, -(-budget // shape.nodes))
        self._curves: dict[tuple[bool, int], OutcomeCurves] = {}
        self._states = [(True, 0)] * batch
        """State of each slot: whether its last round hit, and its temperature bucket."""
        self._prepared: list[list[tuple[int, int]] | None] = [None] * batch
        self._deepest = [0] * batch
        self._parents = shape.parent_index(device)
        # Compiled code reads this tensor in place: its contents change, its address does not.
        self._plan = torch.zeros(2, batch, budget, dtype=torch.int64, device=device)
        self._slots = torch.arange(batch, device=device)[:, None]

    def admit(self, slot: int, temperature: float) -> None:
        bucket = next((i for i, heat in enumerate(HEATS) if temperature <= heat), len(HEATS))
        self._states[slot], self._prepared[slot] = (True, bucket), None

    def prepare(self, trees: Sequence[Sequence[int]]) -> None:
        plans = []
        for slot, tree in enumerate(trees):
            there = (depth for depth, token in zip(self._shape.depths, tree, strict=True) if token != ABSENT)
            self._deepest[slot] = max(there, default=0)
            plans.append(self._curve(slot).plan(self.budget, self._deepest[slot]))
        self._prepared = list(plans)
        self._plan.copy_(torch.tensor(plans).permute(2, 0, 1))

    def learn(self, active: Sequence[bool], nodes: Sequence[int], branches: Sequence[int | None]) -> None:
        for slot, (node, branch, plan) in enumerate(zip(nodes, branches, self._prepared, strict=True)):
            if not active[slot] or plan is None:  # None: admitted since
                continue
            rank = None if branch is None else plan[branch][1]
            fan_out = sum(at == node for at, _ in plan)
            self._curve(slot).learn(node, deepest=self._deepest[slot], fan_out=fan_out, rank=rank)
            self._states[slot] = rank is not None, self._states[slot][1]

    def _curve(self, slot: int) -> OutcomeCurves:
        state = self._states[slot]
        if state not in self._curves:
            self._curves[state] = OutcomeCurves(self._shape, self._ranks)
        return self._curves[state]

    def outcomes(self, scores: Tensor, tokens: Tensor, quiet: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ranks = min(self._ranks, scores.shape[-1])
        best = exclude_children(scores, tokens, self._parents).topk(ranks, dim=-1).indices
        nodes, places = self._plan[0].clone(), self._plan[1].clamp(max=ranks - 1)
        return nodes, best[self._slots, nodes, places]
