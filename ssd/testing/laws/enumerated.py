"""Exact laws of verification rules by enumeration: no samples, no tolerance but rounding.

A toy world is two functions, the target's and the draft's law after a prefix, over V = 3 or 4
tokens. Every candidate tree that can be drawn is enumerated with its probability, every pattern of
passing and failing uniforms with its own, and the rule *itself* is run on each; the bonus token is
integrated over the law the rule returns. What comes out is the joint law of the emitted tokens, in
float64, to be compared with the target's.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...decoding.forecast.base import Forecast
from ...decoding.trees.shape import ABSENT, TreeShape
from ...decoding.verify.block import prefix_laws, verify_block
from ...decoding.verify.draft_probs import DraftProbs
from ...decoding.verify.rejection import BonusLaw, Siblings, inner_nodes, node_laws, verify_rejection

Prefix = tuple[int, ...]
Law = Callable[[Prefix], Sequence[float]]
"""From a prefix to the probabilities ``[V]`` of the next token."""
Weights = tuple[Sequence[int], Sequence[float]]
"""Tokens ``[m]`` and their probabilities ``[m]``: a row of ``DraftProbs``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """One candidate tree that can be drawn after a prefix."""

    weight: float
    """Its probability."""
    tokens: tuple[int, ...]
    """``[W]``, the root's first."""
    draft: tuple[Weights, ...]
    """``[I]``: what each inner node's children are judged by."""


Proposer = Callable[[Prefix], list[Proposal]]
"""All trees that can be drawn after a prefix (its last token is the root)."""


class Rule(ABC):
    """A verification rule as the enumeration sees it: chances of passing, and the rule itself."""

    def __init__(self, shape: TreeShape):
        self.shape = shape

    @abstractmethod
    def chances(self, target_probs: Tensor, tokens: Tensor, draft: DraftProbs) -> Tensor:
        """``[B, W - 1]``: the thresholds the uniforms are compared with."""

    @abstractmethod
    def verify(self, target_probs: Tensor, tokens: Tensor, draft: DraftProbs, uniforms: Tensor) -> BonusLaw:
        """``uniforms`` ``[B, W - 1]``."""


class RejectionRule(Rule):
    """``ssd.decoding.verify.rejection``."""

    def __init__(self, shape: TreeShape):
        super().__init__(shape)
        self.siblings = Siblings(shape)

    def chances(self, target_probs: Tensor, tokens: Tensor, draft: DraftProbs) -> Tensor:
        return node_laws(target_probs, tokens, draft, self.siblings).accept[:, 1:]

    def verify(self, target_probs: Tensor, tokens: Tensor, draft: DraftProbs, uniforms: Tensor) -> BonusLaw:
        root = uniforms.new_full((len(uniforms), 1), 0.5)
        return verify_rejection(target_probs, tokens, draft, torch.cat([root, uniforms], 1), self.siblings)


class BlockRule(Rule):
    """``ssd.decoding.verify.block``; chains only."""

    def chances(self, target_probs: Tensor, tokens: Tensor, draft: DraftProbs) -> Tensor:
        return prefix_laws(target_probs, tokens[:, 1:], draft).accept

    def verify(self, target_probs: Tensor, tokens: Tensor, draft: DraftProbs, uniforms: Tensor) -> BonusLaw:
        return verify_block(target_probs, tokens[:, 1:], draft, uniforms)


def drawn_trees(
    shape: TreeShape,
    distribution: Callable[[Prefix], Weights],
    *,
    judged_by: Callable[[Prefix], Weights] | None = None,
    stop_after: Callable[[Prefix, float], bool] = lambda _prefix, _prob: False,
) -> Proposer:
    """Trees whose children are drawn without replacement.

    Args:
        distribution: ``[m]`` after a prefix. judged_by: what is told to the verifier, if that is
            another one (a mistake).
        stop_after: whether drafting ends below a child, of its prefix and its probability; the
            child itself is still verified.
    """
    told = judged_by or distribution

    def propose(prefix: Prefix) -> list[Proposal]:
        partial: list[tuple[float, dict[int, int]]] = [(1.0, {0: prefix[-1]})]
        for node in inner_nodes(shape):
            grown = []
            for weight, tokens in partial:
                here = _prefix_of(shape, prefix, tokens, node)
                if here is None or (node and stop_after(here, _probability(distribution(here[:-1]), here[-1]))):
                    grown.append((weight, tokens | dict.fromkeys(shape.children(node), ABSENT)))
                    continue
                for chance, drawn in _draws(distribution(here), len(shape.children(node))):
                    children = dict(zip(shape.children(node), drawn, strict=True))
                    grown.append((weight * chance, tokens | children))
            partial = grown
        return [_proposal(shape, prefix, weight, tokens, told) for weight, tokens in partial]

    return propose


def named_trees(shape: TreeShape, ranked: Callable[[Prefix], list[int]]) -> Proposer:
    """The one tree of a deterministic draft: ``ranked`` tokens after a prefix, best first."""

    def propose(prefix: Prefix) -> list[Proposal]:
        tokens = {0: prefix[-1]}
        for node in inner_nodes(shape):
            here = _prefix_of(shape, prefix, tokens, node)
            names = [] if here is None else ranked(here)
            for place, child in enumerate(shape.children(node)):
                tokens[child] = names[place] if place < len(names) else ABSENT
        row = tuple(tokens[node] for node in range(shape.nodes))
        return [Proposal(weight=1.0, tokens=row, draft=(((0,), (0.0,)),) * len(inner_nodes(shape)))]

    return propose


def nothing_proposed(shape: TreeShape) -> Proposer:
    """Plain decoding: no candidate."""
    return named_trees(shape, lambda _prefix: [])


def round_law(rule: Rule, target: Law, prefix: Prefix, proposals: Sequence[Proposal]) -> dict[tuple, float]:
    """Joint law of one round: ``(proposal index, node u, bonus t)`` to probability."""
    shape = rule.shape
    tokens = torch.tensor([proposal.tokens for proposal in proposals])
    rows = _rows(shape, target, prefix, proposals)
    draft = DraftProbs(
        torch.tensor([[row[0] for row in proposal.draft] for proposal in proposals]),
        torch.tensor([[row[1] for row in proposal.draft] for proposal in proposals], dtype=torch.float64),
    )
    weights = torch.tensor([proposal.weight for proposal in proposals], dtype=torch.float64)
    chances = rule.chances(rows, tokens, draft)
    # All patterns of passing and failing, the pattern as outer dimension.
    passing = torch.tensor(list(itertools.product((True, False), repeat=shape.nodes - 1)))[:, None]
    cells = len(passing)
    mass = (torch.where(passing, chances, 1 - chances).prod(-1) * weights).flatten()
    # The middle of the cell: below the threshold, or above it.
    uniforms = torch.where(passing, chances / 2, (1 + chances) / 2).flatten(0, 1)
    repeated = DraftProbs(draft.tokens.repeat(cells, 1, 1), draft.probs.repeat(cells, 1, 1))
    outcome = rule.verify(rows.repeat(cells, 1, 1), tokens.repeat(cells, 1), repeated, uniforms)
    law = torch.zeros(len(proposals), shape.nodes, rows.shape[-1], dtype=torch.float64)
    index = torch.arange(len(proposals)).repeat(cells)
    law.index_put_((index, outcome.node), mass[:, None] * outcome.probs, accumulate=True)
    found = law.nonzero().tolist()
    return {(i, n, t): p for (i, n, t), p in zip(found, law[law != 0].tolist(), strict=True)}


Guesses = Callable[[Prefix, Sequence[Proposal]], list[set[tuple[int, int]]]]


def _no_guesses(_prefix: Prefix, proposals: Sequence[Proposal]) -> list[set[tuple[int, int]]]:
    return [set()] * len(proposals)


def sequence_law(
    rule: Rule,
    target: Law,
    start: Prefix,
    count: int,
    *,
    first: Proposer,
    hit: Proposer | None = None,
    miss: Proposer | None = None,
    guesses: Guesses = _no_guesses,
) -> dict[Prefix, float]:
    """Joint law of the next ``count`` tokens over as many rounds as they take.

    Args:
        first: proposes for the first round; hit: for rounds whose outcome had been forecast;
            miss: for the others (both ``first`` by default).
        guesses: the forecast, of each tree under verification: the outcomes (u, t) prepared for.
    """
    law: dict[Prefix, float] = defaultdict(float)
    open_: dict[tuple[Prefix, str], float] = {(start, "first"): 1.0}
    proposers = {"first": first, "hit": hit or first, "miss": miss or first}
    while open_:
        grown: dict[tuple[Prefix, str], float] = defaultdict(float)
        for (prefix, kind), weight in open_.items():
            proposals = proposers[kind](prefix)
            prepared = guesses(prefix, proposals)
            for (index, node, bonus), chance in round_law(rule, target, prefix, proposals).items():
                path = tuple(proposals[index].tokens[n] for n in rule.shape.path(node))
                emitted = (*prefix[len(start) :], *path, bonus)
                if len(emitted) >= count:
                    law[emitted[:count]] += weight * chance
                else:
                    kind_next = "hit" if (node, bonus) in prepared[index] else "miss"
                    grown[(*start, *emitted), kind_next] += weight * chance
        open_ = grown
    return law


def target_law(target: Law, start: Prefix, count: int) -> dict[Prefix, float]:
    """Joint law of the next ``count`` tokens of plain decoding."""
    law = {(): 1.0}
    for _ in range(count):
        law = {
            (*tokens, token): weight * chance
            for tokens, weight in law.items()
            for token, chance in enumerate(target((*start, *tokens)))
            if chance > 0
        }
    return law


def error(law: dict[Prefix, float], expected: dict[Prefix, float]) -> float:
    """Largest difference of a probability."""
    return max(abs(law.get(key, 0.0) - expected.get(key, 0.0)) for key in law.keys() | expected.keys())


def forecast_guesses(shape: TreeShape, forecast: Forecast, draft: Law) -> Guesses:
    """The pipeline's own forecast over a toy draft's probabilities."""

    def guesses(prefix: Prefix, proposals: Sequence[Proposal]) -> list[set[tuple[int, int]]]:
        scores = _rows(shape, draft, prefix, proposals).log()
        tokens = torch.tensor([proposal.tokens for proposal in proposals])
        nodes, found = forecast.outcomes(scores, tokens)
        return [set(zip(*row, strict=True)) for row in zip(nodes.tolist(), found.tolist(), strict=True)]

    return guesses


def _prefix_of(shape: TreeShape, prefix: Prefix, tokens: dict[int, int], node: int) -> Prefix | None:
    path = [tokens[n] for n in shape.path(node)]
    return None if ABSENT in path else (*prefix, *path)


def _probability(distribution: Weights, token: int) -> float:
    return dict(zip(*distribution, strict=True)).get(token, 0.0)


def _draws(distribution: Weights, count: int) -> list[tuple[float, tuple[int, ...]]]:
    """Ordered draws of ``count`` different tokens, and their probabilities."""
    weights = {t: p for t, p in zip(*distribution, strict=True) if p > 0}
    drawn: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
    for _ in range(count):
        grown = []
        for weight, tokens in drawn:
            left = {token: p for token, p in weights.items() if token not in tokens}
            if not left:
                grown.append((weight, (*tokens, ABSENT)))
            total = sum(left.values())
            grown += [(weight * p / total, (*tokens, token)) for token, p in left.items()]
        drawn = grown
    return drawn


def _proposal(
    shape: TreeShape, prefix: Prefix, weight: float, tokens: dict[int, int], told: Callable[[Prefix], Weights]
) -> Proposal:
    known = [_prefix_of(shape, prefix, tokens, node) for node in inner_nodes(shape)]
    # Where nothing stands, anything may be said.
    draft = tuple(told(here if here is not None else prefix) for here in known)
    return Proposal(weight=weight, tokens=tuple(tokens[node] for node in range(shape.nodes)), draft=draft)


def _rows(shape: TreeShape, law: Law, prefix: Prefix, proposals: Sequence[Proposal]) -> Tensor:
    """``[P, W, V]``: the law after every node of every proposal (after absent ones: some law)."""
    rows = []
    for proposal in proposals:
        tokens = dict(enumerate(proposal.tokens))
        known = [_prefix_of(shape, prefix, tokens, node) for node in range(shape.nodes)]
        rows.append([law(here if here is not None else prefix) for here in known])
    return torch.tensor(rows, dtype=torch.float64)
