"""Forecast: for which outcomes (u, t) the draft prepares a speculation.

The fan-out F_u says how many bonus guesses to prepare after node u; the budget is N = Σ F_u.
With conditional miss F^(-r) at fan-out F and weight w_u (the chance that u is the deepest
accepted node), minimising the miss rate gives F_u ∝ w_u^(1/(1+r)) (Saguaro, arXiv 2603.03251,
Theorem 12). On a chain with per-token acceptance a: w_k = a^k (1 - a) for k < K and, since
nothing is left to reject, w_K = a^K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..trees.shape import ABSENT, TreeShape

IMPOSSIBLE = -1e9
"""Logarithm of a probability that is none; finite, so that 0 · it is 0."""

CONSIDERED_RANKS = 16
"""Guesses considered after one node by :class:`ConfidenceForecast`."""

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


class Forecast(Protocol):
    """Chooses the outcomes (u, t) to prepare for."""

    budget: int
    """N, the number of branches."""
    fan_out: tuple[int, ...]
    """F_u of every node ``[W]``, or about how many each gets."""
    by_row: bool = True
    """Whether what ``outcomes`` says of a row follows from that row's scores alone, so that it may be asked about
    some of the B slots; otherwise about all."""

    def outcomes(self, scores: Tensor, tokens: Tensor, quiet: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Nodes u and bonus tokens t, ``[B, N]`` int64 each, no pair twice.

        Args:
            scores: ``[B, W, V]`` draft scores (noise included) after each node of the tree.
            tokens: ``[B, W]`` int64, its tokens; ``ABSENT`` where there is none.
            quiet: the scores without noise, under rules that draw bonus tokens with it. How many guesses
                a node gets then depends on nothing else: were the noise of later positions to decide
                that, a hit or miss would tell of it, and what follows a miss (an n-gram, nothing) is
                another function of it than what follows a hit.
        """
        ...

    def admit(self, slot: int, temperature: float) -> None:
        """Another sequence has the slot."""

    def prepare(self, trees: Sequence[Sequence[int]]) -> None:
        """``outcomes`` is about to be asked about trees ``[B][W]``."""

    def learn(self, active: Sequence[bool], nodes: Sequence[int], branches: Sequence[int | None]) -> None:
        """What became of them ``[B]``, in ``active`` slots: the deepest accepted node u, and which of the N
        outcomes last returned was the real one (None: none was)."""


class FanOutForecast(Forecast):
    """F_u guesses after node u in every round: branch n guesses the bonus of rank ``ranks[n]``
    after ``nodes[n]``.

    Args: counts: F_u for every node ``[W]``, as from :func:`fan_out`.
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
    """The N most likely outcomes of this round, by the draft's own confidence.

    Let the target's scores be the draft's plus independent Gumbel errors of scale 1/β, in units
    of logits. Then the target's token after a node is t with probability softmax(β · scores)[t],
    at any temperature (the noise is in the scores, and shared). An outcome (u, t) has the
    product of that along u's path, times that of t after u. A branch goes where it is likely to
    be used: none after a node that will not be reached, many where the draft hesitates.

    Args:
        sharpness: β. Higher trusts the draft's ranking more.
    """

    def __init__(self, shape: TreeShape, budget: int, sharpness: float, device: torch.device | str = "cpu"):
        self.budget, self._sharpness = budget, sharpness
        self.fan_out = fan_out(shape, budget, kind="uniform")
        self._parents, self._above = shape.parent_index(device), shape.ancestors(device).float().T

    def outcomes(self, scores: Tensor, tokens: Tensor, quiet: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # Enough ranks to spend the budget, and beyond that a few more than any node is worth.
        noisy, scores = scores, scores if quiet is None else quiet
        _, nodes, vocabulary = scores.shape
        ranks = min(vocabulary, self.budget, max(CONSIDERED_RANKS, -(-self.budget // nodes)))
        total = torch.logsumexp(self._sharpness * scores, dim=-1)
        child = tokens.clamp(min=0)
        batch = torch.arange(len(tokens), device=tokens.device)[:, None]
        # log P(node accepted | its parent is); the root is certain, what is not there impossible.
        accepted = self._sharpness * scores[batch, self._parents, child] - total[:, self._parents]
        accepted = accepted.masked_fill(tokens == ABSENT, IMPOSSIBLE).clamp(min=IMPOSSIBLE)
        accepted[:, 0] = 0.0
        reached = accepted @ self._above.to(accepted.dtype)
        best = exclude_children(scores, tokens, self._parents).topk(ranks, dim=-1)
        likely = (reached - total)[..., None] + self._sharpness * best.values
        chosen = likely.flatten(1).topk(self.budget, dim=-1).indices
        if quiet is not None:  # a node got its first ranks: the noise says which tokens these are
            best = exclude_children(noisy, tokens, self._parents).topk(ranks, dim=-1)
        return chosen // ranks, best.indices.flatten(1).gather(1, chosen)
