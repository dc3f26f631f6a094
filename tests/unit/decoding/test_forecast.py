"""Forecasts: budgets add up, the shape is Theorem 12's, guesses equal a slow reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssd.decoding.forecast.base import (
    SIBLING_SHARE,
    ConfidenceForecast,
    FanOutForecast,
    exclude_children,
    fan_out,
    outcome_weights,
)
from ssd.decoding.trees.shape import ABSENT, TreeShape

rates = st.floats(0.05, 0.97)
combs = st.builds(TreeShape.comb, st.integers(1, 8), st.integers(0, 4))


def closed_form(lookahead: int, budget: float, acceptance: float, power: float) -> list[float]:
    """Saguaro, Theorem 12, with the all-accepted position (research/saguaro.md §2)."""
    beta = acceptance ** (1 / (1 + power))
    last = (1 - acceptance) ** (-1 / (1 + power))
    first = budget / ((1 - beta**lookahead) / (1 - beta) + beta**lookahead * last)
    return [first * beta**k * (last if k == lookahead else 1) for k in range(lookahead + 1)]


@given(combs, rates)
def test_weights_are_a_distribution(shape: TreeShape, acceptance: float) -> None:
    weights = outcome_weights(shape, acceptance)
    assert all(weight >= 0 for weight in weights)
    assert sum(weights) == pytest.approx(1)


def test_weights_by_hand() -> None:
    assert outcome_weights(TreeShape.comb(3), 0.6) == pytest.approx([0.4, 0.6 * 0.4, 0.36 * 0.4, 0.216])
    leaf = 0.4 * SIBLING_SHARE
    # Chain 1-2, leaves 3, 4 under the root and 5, 6 under node 1; the second half as likely as the first.
    assert outcome_weights(TreeShape.comb(2, 2), 0.6) == pytest.approx(
        [0.4 - 1.5 * leaf, 0.6 * (0.4 - 1.5 * leaf), 0.36, leaf, leaf / 2, 0.6 * leaf, 0.6 * leaf / 2]
    )


@given(combs, st.integers(1, 256), st.sampled_from(["uniform", "geometric"]), rates, st.floats(0.2, 4))
def test_budget_is_spent(shape: TreeShape, budget: int, kind: str, acceptance: float, power: float) -> None:
    counts = fan_out(shape, budget, kind=kind, acceptance=acceptance, power=power)
    assert len(counts) == shape.nodes
    assert sum(counts) == budget
    assert min(counts) >= 0
    forecast = FanOutForecast(shape, counts)
    assert forecast.budget == budget
    assert [forecast.nodes.count(node) for node in range(shape.nodes)] == list(counts)
    assert len({*zip(forecast.nodes, forecast.ranks, strict=True)}) == budget


@pytest.mark.parametrize(
    ("lookahead", "acceptance", "power"), [(1, 0.5, 1.0), (4, 0.7, 1.5), (7, 0.8, 1.0), (8, 0.3, 2)]
)
def test_theorem_12_in_the_limit(lookahead: int, acceptance: float, power: float) -> None:
    budget = 10**7
    counts = fan_out(TreeShape.comb(lookahead), budget, acceptance=acceptance, power=power)
    for count, exact in zip(counts, closed_form(lookahead, budget, acceptance, power), strict=True):
        assert abs(count - exact) < 1


def test_the_papers_example() -> None:
    assert fan_out(TreeShape.comb(7), 24, acceptance=0.8, power=1.0) == (4, 3, 3, 3, 3, 2, 2, 4)


def test_uniform() -> None:
    assert fan_out(TreeShape.comb(3), 8, kind="uniform") == (2, 2, 2, 2)
    assert sorted(fan_out(TreeShape.comb(3), 6, kind="uniform")) == [1, 1, 2, 2]
    assert sum(fan_out(TreeShape.comb(7), 3, kind="uniform")) == 3


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="uniform"):
        fan_out(TreeShape.comb(2), 4, kind="measured")


def test_plan_order() -> None:
    forecast = FanOutForecast(TreeShape.comb(2), (2, 0, 3))
    assert (forecast.nodes, forecast.ranks) == ((0, 0, 2, 2, 2), (0, 1, 0, 1, 2))


@given(st.data(), combs, st.integers(12, 20), st.integers(1, 3))
def test_guesses_equal_the_reference(data: st.DataObject, shape: TreeShape, vocabulary: int, batch: int) -> None:
    counts = [data.draw(st.integers(0, 4)) for _ in range(shape.nodes)]
    counts[0] += not sum(counts)
    forecast = FanOutForecast(shape, tuple(counts))
    token = st.integers(ABSENT, vocabulary - 1)
    tokens = [[data.draw(token) for _ in range(shape.nodes)] for _ in range(batch)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores = torch.stack([torch.randperm(shape.nodes * vocabulary, generator=generator) for _ in range(batch)]).float()
    scores = scores.view(batch, shape.nodes, vocabulary)
    before = scores.clone()
    nodes, got = forecast.outcomes(scores, torch.tensor(tokens))
    assert nodes.tolist() == [list(forecast.nodes)] * batch
    excluded = exclude_children(scores, torch.tensor(tokens), shape.parent_index())
    assert torch.equal(scores, before)  # the caller's scores are not written to
    for row in range(batch):
        for node in range(shape.nodes):
            children = {tokens[row][child] for child in shape.children(node)} - {ABSENT}
            left = sorted(set(range(vocabulary)) - children, key=lambda t: -before[row, node, t])
            assert {t for t in range(vocabulary) if excluded[row, node, t] == float("-inf")} == children
            expected = left[: counts[node]]
            mine = [int(g) for g, n in zip(got[row], forecast.nodes, strict=True) if n == node]
            assert mine[: len(expected)] == expected


@given(st.data(), st.builds(TreeShape.comb, st.integers(1, 3), st.integers(0, 2)), st.integers(1, 3))
def test_the_likeliest_outcomes(data: st.DataObject, shape: TreeShape, batch: int) -> None:
    """Against all outcomes and their probabilities under the confidence model, one by one."""
    vocabulary, sharpness = 9, data.draw(st.sampled_from([0.5, 1.0, 2.0]))
    budget = data.draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores = torch.randn(batch, shape.nodes, vocabulary, generator=generator, dtype=torch.float64)
    tokens = torch.empty(batch, shape.nodes, dtype=torch.int64)
    tokens[:, 0] = 0
    for parent in range(shape.nodes):  # children of a node differ, some are absent
        for row in range(batch):
            children = list(shape.children(parent))
            tokens[row, children] = torch.randperm(vocabulary, generator=generator)[: len(children)]
    tokens[:, 1:][torch.rand(batch, shape.nodes - 1, generator=generator) < 0.2] = ABSENT
    nodes, guesses = ConfidenceForecast(shape, budget, sharpness).outcomes(scores.float(), tokens)
    law = (sharpness * scores).softmax(-1)
    for row in range(batch):
        likely: dict[tuple[int, int], float] = {}
        for node in range(shape.nodes):
            path = shape.path(node)
            if any(tokens[row, n] == ABSENT for n in path):
                continue
            reached = 1.0
            for step in path:
                reached *= float(law[row, shape.parents[step - 1], tokens[row, step]])
            below = {int(tokens[row, child]) for child in shape.children(node)}
            for token in set(range(vocabulary)) - below:
                likely[node, token] = reached * float(law[row, node, token])
        assert sum(likely.values()) == pytest.approx(1)  # every outcome is counted, once
        chosen = [likely[pair] for pair in zip(nodes[row].tolist(), guesses[row].tolist(), strict=True)]
        assert len({*zip(nodes[row].tolist(), guesses[row].tolist(), strict=True)}) == budget
        assert chosen == pytest.approx(sorted(likely.values(), reverse=True)[:budget], rel=1e-4)


def test_noise_of_later_positions_does_not_decide_who_gets_a_branch() -> None:
    """Under rules that draw bonus tokens with that noise; within a node it ranks the guesses all the same."""
    generator, shape = torch.Generator().manual_seed(1), TreeShape.comb(3, 1)
    forecast = ConfidenceForecast(shape, 9, 1.4)
    quiet = torch.randn(1, shape.nodes, 20, generator=generator) * 2
    tokens = torch.tensor([[0, 3, 4, 5, 6, 7, 8]])
    quiet[0, shape.parent_index()[1:4], tokens[0, 1:4]] = 5.0  # the chain may well be accepted
    noise = torch.randn(2, 1, shape.nodes, 20, generator=generator) * 3
    nodes, guesses = zip(*(forecast.outcomes(quiet + one, tokens, quiet) for one in noise), strict=True)
    assert torch.equal(nodes[0], nodes[1]) and not torch.equal(guesses[0], guesses[1])
    for one, found in zip(noise, guesses, strict=True):
        best = exclude_children(quiet + one, tokens, shape.parent_index())
        for node in set(nodes[0][0].tolist()):
            mine = found[0][nodes[0][0] == node]
            assert mine.tolist() == best[0, node].topk(len(mine)).indices.tolist()
    assert not torch.equal(*(forecast.outcomes(quiet + one, tokens)[0] for one in noise))
