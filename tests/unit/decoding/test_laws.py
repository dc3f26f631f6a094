"""Laws by exact enumeration: the tokens that rules emit have the target's joint distribution.

The cases stand in ``ssd.testing.laws.cases``; the mistakes one makes here, each shown to fail, in
``test_law_mistakes.py`` and ``test_noise_mistakes.py``.
"""

from __future__ import annotations

import pytest
import torch

from ssd.decoding.trees.shape import ABSENT, TreeShape
from ssd.decoding.verify.block import verify_block
from ssd.decoding.verify.draft_probs import DraftProbs
from ssd.decoding.verify.rejection import Siblings, node_laws, verify_rejection
from ssd.testing.laws import enumerated as laws
from ssd.testing.laws.cases import (
    CHAIN2,
    CHAIN3,
    EXACT,
    SHAPES,
    START,
    WORLDS,
    Case,
    World,
    cases,
    distribution,
    law_error,
)
from ssd.testing.laws.enumerated import BlockRule, Prefix, Proposal, RejectionRule, Rule


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_law(case: Case) -> None:
    error, happened = case.run()
    assert error <= (0 if case.rule == "coupled" else EXACT)
    if case.name.startswith("hit and") and case.rule != "coupled":
        assert happened == {"hit", "miss"}


@pytest.mark.parametrize("shape", SHAPES)
def test_hits_and_misses_under_coupled(shape: str) -> None:
    """Enumerable noise is coarse: not every case has hits and misses, but every tree has."""
    runs = [c.run()[1] for c in cases() if (c.rule, c.shape) == ("coupled", shape) and c.name.startswith("hit and")]
    assert set.union(*runs) == {"hit", "miss"}


def test_early_stops_make_chains_of_several_lengths() -> None:
    """Drafting ends after a token of low confidence, which is still verified: the stop may depend
    on the very token."""
    for shape in SHAPES.values():
        if shape.depth > 1:
            proposals = laws.drawn_trees(
                shape, distribution(WORLDS["V=3"]), stop_after=lambda _prefix, prob: prob < 0.3
            )(START)
            assert len({sum(token != ABSENT for token in proposal.tokens) for proposal in proposals}) > 1


@pytest.mark.parametrize("kind", [RejectionRule, BlockRule])
def test_a_point_mass_spelled_out_is_a_named_candidate(kind: type[Rule]) -> None:
    world, rule = WORLDS["V=3"], kind(CHAIN2)
    (named,) = laws.named_trees(CHAIN2, world.ranked)(START)
    spelled = Proposal(weight=1, tokens=named.tokens, draft=tuple(((t,), (1.0,)) for t in named.tokens[1:]))
    one, other = (laws.round_law(rule, world.target, START, [proposal]) for proposal in (named, spelled))
    assert one == other
    assert {node for _, node, _ in one} == {0, 1, 2}


def accepted(rule: Rule, world: World, proposer: laws.Proposer) -> float:
    law = laws.round_law(rule, world.target, START, proposer(START))
    return sum(rule.shape.depths[node] * chance for (_, node, _), chance in law.items())


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_block_accepts_no_less(world: World) -> None:
    """Sun et al. 2024, Theorem 2: optimal for chains."""
    proposer = laws.drawn_trees(CHAIN3, distribution(world))
    token_wise, block = (accepted(kind(CHAIN3), world, proposer) for kind in (RejectionRule, BlockRule))
    assert block >= token_wise - EXACT
    alpha = sum(min(p, q) for p, q in zip(world.target(START), world.draft(START), strict=True))
    one = TreeShape.comb(1)
    assert accepted(RejectionRule(one), world, laws.drawn_trees(one, distribution(world))) == pytest.approx(alpha)


def test_block_accepts_more_somewhere() -> None:
    world = WORLDS["V=4"]
    proposer = laws.drawn_trees(CHAIN3, distribution(world))
    assert accepted(BlockRule(CHAIN3), world, proposer) > accepted(RejectionRule(CHAIN3), world, proposer) + 0.01


def test_saguaro_moves_the_bonus_onto_the_forecast() -> None:
    """More hits after a rejection, and fewer acceptances of a draft that is right: its purpose and its price."""
    world, shape = WORLDS["V=4"], TreeShape.comb(1)
    best = world.ranked(START)[0]
    for target, right in ((world.target, False), (world.draft, True)):
        hits, taken = [], []
        for scale in (1.0, 0.3, 0.01):
            proposals = laws.drawn_trees(shape, distribution(world, scale=scale, count=1))(START)
            law = laws.round_law(RejectionRule(shape), target, START, proposals)
            hits.append(sum(p for (_, node, bonus), p in law.items() if node == 0 and bonus == best))
            taken.append(sum(p for (_, node, _), p in law.items() if node == 1))
        assert hits == sorted(hits) and hits[0] < hits[-1] - 0.05
        if right:
            assert taken[0] == pytest.approx(1) and taken == sorted(taken, reverse=True) and taken[-1] < 0.95


def test_a_repeated_sibling_is_useless_but_correct() -> None:
    """Two draws with replacement: the second of two equal ones has nothing left to be accepted by,
    and one that differs has the law of a draw without replacement."""
    world, shape = WORLDS["V=3"], TreeShape.comb(1, siblings=1)

    def propose(prefix: Prefix) -> list[Proposal]:
        law = distribution(world)(prefix)
        return [
            Proposal(weight=law[1][a] * law[1][b], tokens=(prefix[-1], a, b), draft=(law,))
            for a in range(3)
            for b in range(3)
        ]

    assert law_error(RejectionRule(shape), world, 2, first=propose) <= EXACT


def test_nothing_passes_at_ratio_zero() -> None:
    """The smallest uniform number is above 0, and comparisons are strict."""
    shape = TreeShape.comb(1)
    rows = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]], dtype=torch.float64)
    drawn = DraftProbs(torch.arange(2)[None, None], torch.tensor([[[0.5, 0.5]]], dtype=torch.float64))
    impossible = torch.tensor([[1, 0]])
    smallest = (torch.zeros(1, 2, dtype=torch.float64) + 0.5) * 2.0**-31
    for uniforms in (torch.zeros(1, 2, dtype=torch.float64), smallest):
        assert int(verify_rejection(rows, impossible, drawn, uniforms, Siblings(shape)).node) == 0
        assert int(verify_block(rows, impossible[:, 1:], drawn, uniforms[:, 1:]).node) == 0
    assert node_laws(rows, impossible, drawn, Siblings(shape)).accept[0, 1] == 0
