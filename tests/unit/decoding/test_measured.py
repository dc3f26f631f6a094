"""The measured forecast: its estimates, its allocation, and that it learns."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssd import LLM, SamplingParams
from ssd.decoding.forecast.measured import MeasuredForecast, OutcomeCurves
from ssd.decoding.trees.shape import ABSENT, TreeShape
from ssd.pipeline.runtime.launch import InprocPipeline

CHAIN, COMB = TreeShape.comb(3), TreeShape.comb(2, 2)


def teach(
    curves: OutcomeCurves,
    shape: TreeShape,
    budget: int,
    rounds: int,
    *,
    accepts: float,
    ranks: list[float],
    seed: int = 0,
) -> float:
    """Outcomes of a chain whose tokens are accepted with one chance and whose bonus tokens have these ranks.
    Returns the hit rate of what was planned."""
    draw, hits = random.Random(seed), 0
    for _ in range(rounds):
        node = 0
        while node < shape.depth and draw.random() < accepts:
            node += 1
        rank = draw.choices(range(len(ranks)), ranks)[0]
        plan = curves.plan(budget, shape.depth)
        there = (node, rank) in plan
        fan_out = sum(at == node for at, _ in plan)
        curves.learn(node, deepest=shape.depth, fan_out=fan_out, rank=rank if there else None)
        hits += there
    return hits / rounds


@pytest.mark.parametrize("shape", [CHAIN, COMB])
@pytest.mark.parametrize("budget", [1, 5, 8, 24])
def test_plans_spend_the_budget_without_gaps(shape: TreeShape, budget: int) -> None:
    for deepest in range(shape.depth + 1):
        plan = OutcomeCurves(shape, 16).plan(budget, deepest)
        assert len(plan) == len(set(plan)) == budget
        for node, rank in plan:
            assert rank == 0 or (node, rank - 1) in plan
        if budget <= 8:  # there are enough outcomes that can be
            assert all(shape.depths[node] <= deepest for node, _ in plan)


def test_weights_are_a_law() -> None:
    for shape in (CHAIN, COMB):
        curves = OutcomeCurves(shape, 4)
        for deepest in range(shape.depth + 1):
            weights = curves.weights(deepest)
            assert sum(weights) == pytest.approx(1.0)
            assert all(w == 0.0 for w, depth in zip(weights, shape.depths, strict=True) if depth > deepest)


def test_it_learns_where_outcomes_fall() -> None:
    ranks = [0.5, 0.2, 0.1, 0.1, 0.05, 0.05]
    for accepts, node in ((0.02, 0), (0.98, 3)):
        curves = OutcomeCurves(CHAIN, 16)
        teach(curves, CHAIN, 6, 800, accepts=accepts, ranks=ranks)
        plan = curves.plan(6, 3)
        assert sum(at == node for at, _ in plan) >= 4
        assert {at for at, _ in plan} < {0, 1, 2, 3}  # F_u = 0 is allowed


def test_close_to_the_best_known_allocation() -> None:
    """Against the greedy allocation for the true distribution, and against the uniform one."""
    accepts, ranks = 0.8, [0.45, 0.2, 0.12, 0.08, 0.06, 0.05, 0.04]
    weights = [accepts**k * (1 - accepts if k < 3 else 1) for k in range(4)]
    worth = sorted((w * m for w in weights for m in ranks), reverse=True)
    even = sum(w * sum(ranks[:2]) for w in weights)
    curves = OutcomeCurves(CHAIN, 16)
    teach(curves, CHAIN, 8, 1500, accepts=accepts, ranks=ranks)
    found = teach(curves, CHAIN, 8, 4000, accepts=accepts, ranks=ranks, seed=1)
    assert found > 0.97 * sum(worth[:8])
    assert found > even


def test_it_follows_a_change() -> None:
    curves, ranks = OutcomeCurves(CHAIN, 16), [0.6, 0.2, 0.1, 0.1]
    teach(curves, CHAIN, 6, 1500, accepts=0.98, ranks=ranks)
    before = sum(node == 0 for node, _ in curves.plan(6, 3))
    teach(curves, CHAIN, 6, 3000, accepts=0.02, ranks=ranks)
    assert before <= 1 < sum(node == 0 for node, _ in curves.plan(6, 3))


def test_each_slot_has_its_own_state() -> None:
    """A slot's results are learned by its state alone, and not at all if another sequence was admitted since."""
    forecast = MeasuredForecast(CHAIN, 6, batch=3)
    trees = torch.tensor([[1, 2, 3, 4]] * 3)
    scores = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    for slot, temperature in enumerate((0.0, 1.0, 0.0)):
        forecast.admit(slot, temperature)
    for _ in range(200):
        forecast.prepare(trees.tolist())
        nodes, guesses = forecast.outcomes(scores, trees)
        assert nodes.shape == guesses.shape == (3, 6)
        branches = (nodes == 0).int().argmax(-1).tolist()
        forecast.learn([True, False, True], [0, 3, 0], [branches[0], None, branches[2]])
    forecast.prepare(trees.tolist())
    nodes, guesses = forecast.outcomes(scores, trees)
    assert (nodes[0] == 0).sum() > (nodes[1] == 0).sum()
    assert torch.equal(nodes[0], nodes[2])
    for row in range(3):  # the guesses are the scores' ranks, the tree's own next tokens left out
        for at, guess in zip(nodes[row].tolist(), guesses[row].tolist(), strict=True):
            assert at == 3 or guess != trees[row, at + 1]
    forecast.admit(0, 0.0)
    forecast.learn([True] * 3, [0] * 3, [0] * 3)
    absent = trees.clone()
    absent[:, 1:] = ABSENT
    forecast.prepare(absent.tolist())
    assert (forecast.outcomes(scores, absent)[0] == 0).all()


@pytest.mark.parametrize(
    ("verify", "siblings", "lookahead"), [("coupled", 1, 3), ("coupled", 0, "auto"), ("block", 0, 3)]
)
def test_equal_to_plain(
    verify: str, siblings: int, lookahead: int | str, tiny_config: Callable[..., dict[str, Any]]
) -> None:
    speculation = {
        "lookahead": lookahead,
        "siblings": siblings,
        "verify": verify,
        "forecast": {"budget": 10, "shape": "measured"},
    }
    config = tiny_config(engine={"max_batch": 2}, speculation=speculation)
    prompts = [[5, 6, 7, 8] * 5, [9, 9, 9, 4, 5], list(range(20, 50))]
    temperatures = (0.0, 0.9) if verify == "coupled" else (0.0,)
    with LLM(config, launch=InprocPipeline) as llm:
        for temperature in temperatures:
            params = [SamplingParams(max_tokens=30, temperature=temperature, seed=s, ignore_eos=True) for s in range(3)]
            plain, drafted = (
                llm.generate(prompts, [replace(one, method=method) for one in params]) for method in ("none", "ssd")
            )
            assert llm.degraded is None
            assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
            assert 0 < sum(one.speculation.hits for one in drafted) < sum(one.speculation.lookups for one in drafted)
