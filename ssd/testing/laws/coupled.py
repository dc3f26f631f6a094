"""The law under coupled verification, counted: no samples, and no rounding either.

Draft and target share their noise, so a round's candidates tell something of the target's tokens,
and the enumeration of ``laws`` (candidates and uniforms independent) does not apply. Here the noise
of a position is one of ``GRID`` equally likely values, both sides choose by inverting their
cumulative weights at it (another coupling than Gumbel's with the same laws, and one that can be
counted), and every sequence of noise values is run through the rule itself. Probabilities are
integers over ``GRID ** positions``.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from fractions import Fraction

import torch

from ...decoding.forecast.base import Forecast
from ...decoding.trees.shape import ABSENT, TreeShape
from ...decoding.verify.coupled import verify_coupled
from .enumerated import Prefix

GRID = 6
Counts = Callable[[Prefix], tuple[int, ...]]
"""From a prefix to the weights ``[V]`` of the next token, of sum ``GRID``."""
Noise = tuple[int, ...]
CoupledProposer = Callable[[Prefix, Noise], list[int]]
"""The tree ``[W]`` drafted after a prefix (its last token is the root), and the noise of the
positions from there on, which the draft knows."""


def inverted(weights: Iterable[int], noise: int) -> int:
    """The token in whose share of ``range(GRID)`` the noise falls."""
    return next(token for token, upto in enumerate(itertools.accumulate(weights)) if noise < upto)


def drafted(shape: TreeShape, draft: Counts, *, least: int = 0) -> CoupledProposer:
    """The draft's choice by the shared noise, then its most probable other tokens.

    Args: least: drafting ends below a token of smaller weight; it is still verified.
    """

    def children(prefix: Prefix, noise: int) -> list[int]:
        weights = draft(prefix)
        best = inverted(weights, noise)
        others = sorted((t for t in range(len(weights)) if t != best), key=lambda t: -weights[t])
        return [best, *others]

    def goes_on(prefix: Prefix) -> bool:
        return draft(prefix[:-1])[prefix[-1]] >= least

    return _grown(shape, children, goes_on)


def named(shape: TreeShape, ranked: Callable[[Prefix], list[int]]) -> CoupledProposer:
    """A draft that names tokens whatever the noise; none where ``ranked`` has none."""
    return _grown(shape, lambda prefix, _noise: ranked(prefix), lambda _prefix: True)


def _grown(
    shape: TreeShape, children: Callable[[Prefix, int], list[int]], goes_on: Callable[[Prefix], bool]
) -> CoupledProposer:
    def propose(prefix: Prefix, noise: Noise) -> list[int]:
        tokens = [prefix[-1], *[ABSENT] * (shape.nodes - 1)]
        for node in sorted(range(shape.nodes), key=lambda n: shape.depths[n]):
            path = tuple(tokens[n] for n in shape.path(node))
            if ABSENT in path or (path and not goes_on((*prefix, *path))):
                continue
            for child, token in zip(shape.children(node), children((*prefix, *path), noise[len(path)]), strict=False):
                tokens[child] = token
        return tokens

    return propose


def sequence_law(
    shape: TreeShape,
    target: Counts,
    start: Prefix,
    count: int,
    *,
    first: CoupledProposer,
    hit: CoupledProposer | None = None,
    miss: CoupledProposer | None = None,
    forecast: Forecast | None = None,
    draft: Counts | None = None,
) -> dict[Prefix, Fraction]:
    """Joint law of the next ``count`` tokens over as many rounds as they take.

    Args:
        first, hit, miss: as in ``laws.sequence_law``. forecast: of the pipeline, over ``draft``'s
            weights and the noise; without one every round is a miss.
    """
    proposers = {"first": first, "hit": hit or first, "miss": miss or first}
    parents, depths, ancestors = shape.parent_index("cpu"), shape.depth_index("cpu"), shape.ancestors("cpu")
    law: Counter[Prefix] = Counter()
    # A round looks up to depth + 1 positions ahead; what lies beyond count is never emitted.
    tail = (0,) * (shape.depth + 1)
    open_: list[tuple[Prefix, str, Noise]] = [
        (start, "first", noise) for noise in itertools.product(range(GRID), repeat=count)
    ]
    while open_:
        trees, chosen, scores = [], [], []
        for prefix, kind, noise in open_:
            ahead = (*noise[len(prefix) - len(start) :], *tail)
            tree = proposers[kind](prefix, ahead)
            here = [(*prefix, *(tree[n] for n in shape.path(node))) for node in range(shape.nodes)]
            trees.append(tree)
            row = zip(here, shape.depths, strict=True)
            chosen.append([inverted(target(p), ahead[d]) if ABSENT not in p else 0 for p, d in row])
            if draft is not None:
                scores.append([_scores(draft, p, ahead[d]) for p, d in zip(here, shape.depths, strict=True)])
        tokens = torch.tensor(trees)
        outcome = verify_coupled(tokens, torch.tensor(chosen), parents, depths, ancestors)
        prepared = [set()] * len(trees) if forecast is None else _prepared(forecast, torch.tensor(scores), tokens)
        grown = []
        decided = zip(open_, trees, outcome.node.tolist(), outcome.bonus.tolist(), prepared, strict=True)
        for (prefix, _, noise), tree, node, bonus, guesses in decided:
            prefix = (*prefix, *(tree[n] for n in shape.path(node)), bonus)
            emitted = prefix[len(start) :]
            if len(emitted) >= count:
                law[emitted[:count]] += 1
            else:
                grown.append((prefix, "hit" if (node, bonus) in guesses else "miss", noise))
        open_ = grown
    return {tokens: Fraction(seen, GRID**count) for tokens, seen in law.items()}


def _scores(draft: Counts, prefix: Prefix, noise: int) -> list[float]:
    """Logarithms of the weights, the token the noise chooses first."""
    weights = [0] * len(draft((0,))) if ABSENT in prefix else list(draft(prefix))
    scores = [float(torch.tensor(weight + 1e-3).log()) for weight in weights]
    if any(weights):
        scores[inverted(weights, noise)] += 5.0
    return scores


def _prepared(forecast: Forecast, scores: torch.Tensor, tokens: torch.Tensor) -> list[set[tuple[int, int]]]:
    nodes, guesses = forecast.outcomes(scores, tokens)
    return [set(zip(*row, strict=True)) for row in zip(nodes.tolist(), guesses.tolist(), strict=True)]


def target_law(target: Counts, start: Prefix, count: int) -> dict[Prefix, Fraction]:
    """Joint law of the next ``count`` tokens of plain decoding."""
    law: dict[Prefix, Fraction] = {(): Fraction(1)}
    for _ in range(count):
        grown: dict[Prefix, Fraction] = defaultdict(Fraction)
        for tokens, chance in law.items():
            for token, weight in enumerate(target((*start, *tokens))):
                if weight:
                    grown[*tokens, token] += chance * Fraction(weight, GRID)
        law = grown
    return law


def error(law: dict[Prefix, Fraction], expected: dict[Prefix, Fraction]) -> float:
    """Largest difference of a probability; 0 is exact."""
    zero = Fraction(0)
    return float(max(abs(law.get(key, zero) - expected.get(key, zero)) for key in law.keys() | expected.keys()))
