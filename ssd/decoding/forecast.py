"""Forecast: for which outcomes (u, t) the draft prepares a speculation.

The fan-out F_u says how many bonus guesses to prepare after node u; the budget is N = Σ F_u.
With conditional miss F^(-r) at fan-out F and weight w_u (the chance that u is the deepest
accepted node), minimising the miss rate gives F_u ∝ w_u^(1/(1+r)) (Saguaro, arXiv 2603.03251,
Theorem 12). On a chain with per-token acceptance a: w_k = a^k (1 - a) for k < K and, since
nothing is left to reject, w_K = a^K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .tree import ABSENT, TreeShape

SIBLING_SHARE = 0.35
"""Prior chance that, the chain's token having failed, the best sibling is the target's token."""


def outcome_weights(shape: TreeShape, acceptance: float) -> list[float]:
    """Chance ``[W]`` that each node is the deepest accepted one, for a comb.

    ``acceptance`` is the chance that a chain node is accepted given its parent is; siblings
    share ``SIBLING_SHARE`` of the rest, each next rank half as likely as the one before.
    """
    chain = set(shape.chain)
    reach = {0: 1.0}
    weights = [0.0] * shape.nodes
    for node in sorted(range(shape.nodes), key=lambda n: shape.depths[n]):
        leave = reach[node]
        left, share = 1.0, SIBLING_SHARE
        for child in shape.children(node):
            if child in chain:
                taken = acceptance
            else:
                taken = (1.0 - acceptance) * share
                share /= 2
            reach[child] = leave * taken
            left -= taken
        weights[node] = leave * left
    return weights


def fan_out(
    shape: TreeShape, budget: int, *, kind: str = "geometric", acceptance: float = 0.7, power: float = 1.5
) -> tuple[int, ...]:
    """F_u for every node ``[W]``, Σ F_u = budget.

    ``uniform`` spreads the budget evenly; ``geometric`` by F_u ∝ w_u^(1/(1+power)), rounded by
    largest remainder. With a budget below the number of nodes the least likely get none.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "uniform":
        shares = [1.0] * shape.nodes
    elif kind == "geometric":
        shares = [weight ** (1 / (1 + power)) for weight in outcome_weights(shape, acceptance)]
    else:
        raise ValueError(f"forecast shape must be 'uniform' or 'geometric', not {kind!r}")
    scale = budget / sum(shares)
    exact = [share * scale for share in shares]
    counts = [int(value) for value in exact]
    order = sorted(range(shape.nodes), key=lambda n: (counts[n] - exact[n], n))
    for node in order[: budget - sum(counts)]:
        counts[node] += 1
    return tuple(counts)


@dataclass(frozen=True)
class Forecast:
    """A static plan: branch n guesses the bonus token of rank ``ranks[n]`` after ``nodes[n]``."""

    nodes: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def plan(cls, counts: tuple[int, ...]) -> Forecast:
        pairs = [(node, rank) for node, count in enumerate(counts) for rank in range(count)]
        return cls(tuple(n for n, _ in pairs), tuple(r for _, r in pairs))

    @property
    def budget(self) -> int:
        """N, the number of branches."""
        return len(self.nodes)


def exclude_children(scores: Tensor, tokens: Tensor, parents: Tensor) -> Tensor:
    """Scores ``[B, W, V]`` with every node's own children set to -inf.

    If u is the deepest accepted node, the bonus after it is none of its children: the target's
    token was compared with each. ``tokens`` ``[B, W]`` (``ABSENT`` children exclude nothing),
    ``parents`` ``[W]``.
    """
    child = tokens[:, 1:]
    batch = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(child)
    # Added, not assigned: an absent child must not undo a present one of the same index.
    drop = torch.zeros_like(child, dtype=scores.dtype).masked_fill(child != ABSENT, float("-inf"))
    return scores.index_put((batch, parents[1:].expand_as(child), child.clamp(min=0)), drop, accumulate=True)


def bonus_guesses(scores: Tensor, tokens: Tensor, parents: Tensor, nodes: Tensor, ranks: Tensor, width: int) -> Tensor:
    """The forecast's guesses ``[B, N]`` int64.

    Args:
        scores: ``[B, W, V]`` draft scores (noise included) after each node.
        tokens: ``[B, W]`` node tokens.
        parents: ``[W]``; nodes, ranks: ``[N]`` int64 of the plan; width: 1 + the largest rank.
    """
    best = exclude_children(scores, tokens, parents).topk(width, dim=-1).indices
    return best[:, nodes, ranks]
