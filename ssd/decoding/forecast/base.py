"""Forecast: for which outcomes (u, t) the draft prepares a speculation.

The fan-out F_u is the number of bonus guesses prepared after node u; the budget is N = Σ F_u.
With conditional miss F^(-r) at fan-out F and weight w_u (the probability that u is the deepest
accepted node), minimising the miss rate gives F_u ∝ w_u^(1/(1+r)) (Saguaro, arXiv 2603.03251,
Theorem 12). On a chain with per-token acceptance a: w_k = a^k (1 - a) for k < K and, since
no token is left to reject, w_K = a^K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..trees.shape import ABSENT, TreeShape

IMPOSSIBLE = -1e9
"""Logarithm of probability 0; finite, so that its product with 0 is 0."""

CONSIDERED_RANKS = 16
"""Guesses after one node that :class:`ConfidenceForecast` considers, at least."""

SIBLING_SHARE = 0.35
"""Prior probability that the best sibling is the target's token, once the chain's token was rejected."""


def outcome_weights(shape: TreeShape, acceptance: float) -> list[float]:
    """Returns the probability ``[W]`` that each node of a comb is the deepest accepted one.

    Args:
        shape: the comb.
        acceptance: probability that a chain node is accepted, given that its parent is. The first sibling gets
            ``SIBLING_SHARE`` of the rest, each further one half of the one before.
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
    """Returns F_u for every node ``[W]``, with Σ F_u = budget.

    Args:
        shape: the tree.
        budget: N. If it is below W, the least likely nodes get no guess.
        kind: ``uniform`` spreads the budget evenly; ``geometric`` by F_u ∝ w_u^(1/(1+power)), rounded by
            largest remainder.
        acceptance: as for :func:`outcome_weights`.
        power: r of Theorem 12.

    Raises:
        ValueError: the kind is unknown.
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


def exclude_children(scores: Tensor, tokens: Tensor, parents: Tensor) -> Tensor:
    """Returns scores with every node's own children set to -inf.

    If u is the deepest accepted node, the bonus token after it is none of its children: the target's
    token was compared with each.

    Args:
        scores: ``[B, W, V]``.
        tokens: ``[B, W]`` int64; ``ABSENT`` children exclude nothing.
        parents: ``[W]`` int64.
    """
    child = tokens[:, 1:]
    batch = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(child)
    # Added, not assigned: an absent child must not overwrite a present one with the same index.
    drop = torch.zeros_like(child, dtype=scores.dtype).masked_fill(child != ABSENT, float("-inf"))
    return scores.index_put((batch, parents[1:].expand_as(child), child.clamp(min=0)), drop, accumulate=True)


class Forecast(Protocol):
    """Chooses the outcomes (u, t) to prepare for."""

    budget: int
    """N, the number of branches."""
    fan_out: tuple[int, ...]
    """F_u of every node ``[W]``, at least approximately."""
    by_row: bool = True
    """Whether a row's outcomes depend on that row alone, so that ``outcomes`` may be called for some of the B slots
    instead of all."""

    def outcomes(self, scores: Tensor, tokens: Tensor, quiet: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns nodes u and bonus tokens t, ``[B, N]`` int64 each, without repeated pairs.

        Args:
            scores: ``[B, W, V]`` draft scores (noise included) after each node of the tree.
            tokens: ``[B, W]`` int64, the tree's tokens; ``ABSENT`` where there is none.
            quiet: the scores without noise, under rules that draw bonus tokens with noise. The number of guesses
                after a node then depends on these alone. If the noise of later positions decided it, a hit or
                a miss would depend on that noise, and the candidates after a miss (an n-gram, none) are
                another function of it than those after a hit.
        """
        ...

    def admit(self, slot: int, temperature: float) -> None:
        """Is called when another sequence gets the slot."""

    def prepare(self, trees: Sequence[Sequence[int]]) -> None:
        """Is called before ``outcomes``, with the trees' tokens ``[B][W]``."""

    def learn(self, active: Sequence[bool], nodes: Sequence[int], branches: Sequence[int | None]) -> None:
        """Is called with the results of the outcomes returned last.

        Args:
            active: ``[B]``, the slots that took part.
            nodes: ``[B]``, the deepest accepted node u.
            branches: ``[B]``, which of the N outcomes was the real one; None for a miss.
        """


class FanOutForecast(Forecast):
    """Prepares F_u guesses after node u in every round: branch n guesses the bonus token of rank ``ranks[n]``
    after ``nodes[n]``.

    Args:
        shape: the tree.
        counts: F_u for every node ``[W]``, as from :func:`fan_out`.
        device: where outcomes are computed.
    """

    def __init__(self, shape: TreeShape, counts: tuple[int, ...], device: torch.device | str = "cpu"):
        pairs = [(node, rank) for node, count in enumerate(counts) for rank in range(count)]
        self.nodes, self.ranks = tuple(n for n, _ in pairs), tuple(r for _, r in pairs)
        self.budget, self.fan_out = len(pairs), counts
        self._parents = shape.parent_index(device)
        self._nodes, self._ranks = torch.tensor(self.nodes, device=device), torch.tensor(self.ranks, device=device)

    def outcomes(self, scores: Tensor, tokens: Tensor, quiet: Tensor | None = None) -> tuple[Tensor, Tensor]:
        best = exclude_children(scores, tokens, self._parents).topk(max(self.ranks) + 1, dim=-1).indices
        return self._nodes.expand(len(tokens), -1), best[:, self._nodes, self._ranks]


class ConfidenceForecast(Forecast):
    """Prepares the N most likely outcomes of this round, by the draft's own confidence.

    Let the target's scores be the draft's plus independent Gumbel errors of scale 1/β, in units
    of logits. Then the target's token after a node is t with probability softmax(β · scores)[t],
    at any temperature (the noise is part of the scores, and shared). An outcome (u, t) has the
    product of these probabilities along u's path, times that of t after u. So branches go where
    they are likely to be used: few after a node that is hardly reached, many where the draft is
    uncertain.

    Args:
        shape: the tree.
        budget: N.
        sharpness: β. A higher one trusts the draft's ranking more.
        device: where outcomes are computed.
    """

    def __init__(self, shape: TreeShape, budget: int, sharpness: float, device: torch.device | str = "cpu"):
        self.budget, self._sharpness = budget, sharpness
        self.fan_out = fan_out(shape, budget, kind="uniform")
        self._parents, self._above = shape.parent_index(device), shape.ancestors(device).float().T

    def outcomes(self, scores: Tensor, tokens: Tensor, quiet: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # Enough ranks to spend the budget, and at least as many as a node can be worth.
        noisy, scores = scores, scores if quiet is None else quiet
        _, nodes, vocabulary = scores.shape
        ranks = min(vocabulary, self.budget, max(CONSIDERED_RANKS, -(-self.budget // nodes)))
        total = torch.logsumexp(self._sharpness * scores, dim=-1)
        child = tokens.clamp(min=0)
        batch = torch.arange(len(tokens), device=tokens.device)[:, None]
        # log P(node accepted | its parent is): the root is certain, absent nodes are impossible.
        accepted = self._sharpness * scores[batch, self._parents, child] - total[:, self._parents]
        accepted = accepted.masked_fill(tokens == ABSENT, IMPOSSIBLE).clamp(min=IMPOSSIBLE)
        accepted[:, 0] = 0.0
        reached = accepted @ self._above.to(accepted.dtype)
        best = exclude_children(scores, tokens, self._parents).topk(ranks, dim=-1)
        likely = (reached - total)[..., None] + self._sharpness * best.values
        chosen = likely.flatten(1).topk(self.budget, dim=-1).indices
        if quiet is not None:  # every node got its first ranks; the noise decides which tokens have them
            best = exclude_children(noisy, tokens, self._parents).topk(ranks, dim=-1)
        return chosen // ranks, best.indices.flatten(1).gather(1, chosen)
