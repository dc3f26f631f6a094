"""Typical mistakes with verification rules, each shown to fail the laws: otherwise passing them would
prove nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssd.decoding.trees.shape import ABSENT, TreeShape
from ssd.decoding.verify.draft_probs import DraftProbs
from ssd.decoding.verify.rejection import BonusLaw, inner_nodes
from ssd.testing.laws import enumerated as laws
from ssd.testing.laws.cases import CHAIN2, CHAIN3, COMB, EXACT, START, WORLDS, distribution, law_error, weights
from ssd.testing.laws.enumerated import BlockRule, Prefix, Proposal, RejectionRule, Rule, Weights

WRONG = 1e-3


def mistaken(rule: Rule, change: Callable[..., BonusLaw]) -> Rule:
    """``change(target_probs, tokens, draft, outcome)`` instead of the outcome."""
    verify = rule.verify

    def wrong(target_probs: Tensor, tokens: Tensor, draft: DraftProbs, uniforms: Tensor) -> BonusLaw:
        return change(target_probs, tokens, draft, verify(target_probs, tokens, draft, uniforms))

    rule.verify = wrong  # type: ignore[method-assign]
    return rule


@pytest.mark.parametrize("kind", [RejectionRule, BlockRule])
@pytest.mark.parametrize("by", [-1, 1])
def test_residual_off_by_one(kind: type[Rule], by: int) -> None:
    """The residual of the node before, or after, the one it belongs to."""

    def change(target_probs: Tensor, tokens: Tensor, draft: DraftProbs, outcome: BonusLaw) -> BonusLaw:
        rows = torch.arange(len(tokens))
        node = (outcome.node + by).clamp(0, draft.tokens.shape[1] - 1)
        residual = (target_probs[rows, node] - draft.dense(3)[rows, node]).clamp(min=0)
        residual /= residual.sum(-1, keepdim=True).clamp(min=1e-300)
        return outcome._replace(probs=torch.where(outcome.own[:, None], outcome.probs, residual))

    world = WORLDS["V=3"]
    proposer = laws.drawn_trees(CHAIN3, distribution(world))
    found = laws.sequence_law(mistaken(kind(CHAIN3), change), world.target, START, 2, first=proposer)
    assert laws.error(found, laws.target_law(world.target, START, 2)) > WRONG


@pytest.mark.parametrize("kind", [RejectionRule, BlockRule])
def test_bonus_from_the_target_after_a_rejection(kind: type[Rule]) -> None:
    def change(target_probs: Tensor, tokens: Tensor, _draft: DraftProbs, outcome: BonusLaw) -> BonusLaw:
        return outcome._replace(probs=target_probs[torch.arange(len(tokens)), outcome.node])

    world = WORLDS["V=3"]
    proposer = laws.drawn_trees(CHAIN2, distribution(world))
    assert law_error(mistaken(kind(CHAIN2), change), world, 2, first=proposer) > WRONG


@pytest.mark.parametrize("kind", [RejectionRule, BlockRule])
def test_temperature_on_one_side(kind: type[Rule]) -> None:
    """Drawn at one temperature, verified with the probabilities of another."""
    world = WORLDS["V=3"]

    def at_half(prefix: Prefix) -> Weights:
        return weights(world.draft_logits(prefix) / 0.5)

    wrong = laws.drawn_trees(CHAIN2, at_half, judged_by=distribution(world))
    assert law_error(kind(CHAIN2), world, 2, first=wrong) > WRONG
    right = laws.drawn_trees(CHAIN2, at_half)
    assert law_error(kind(CHAIN2), world, 2, first=right) <= EXACT


@pytest.mark.parametrize("kind", [RejectionRule, BlockRule])
def test_the_scaled_row_stays_at_home(kind: type[Rule]) -> None:
    """Drawn from Saguaro's scaled row, verified with the unscaled one."""
    world = WORLDS["V=3"]
    scaled, plain = distribution(world, scale=0.3, count=1), distribution(world)
    assert law_error(kind(CHAIN2), world, 2, first=laws.drawn_trees(CHAIN2, scaled, judged_by=plain)) > WRONG


@pytest.mark.parametrize("kind", [RejectionRule, BlockRule])
def test_the_support_is_not_renormalised(kind: type[Rule]) -> None:
    """Drawn from the m best, verified with the whole row."""
    world = WORLDS["V=4"]
    compact, whole = distribution(world, support=2), distribution(world)
    assert law_error(kind(CHAIN2), world, 2, first=laws.drawn_trees(CHAIN2, compact, judged_by=whole)) > WRONG


@pytest.mark.parametrize("kind", [RejectionRule, BlockRule])
def test_the_unlikely_token_is_thrown_away(kind: type[Rule]) -> None:
    """Stopping *before* a token because of its identity: the remaining tokens are a selection."""
    world, shape = WORLDS["V=3"], CHAIN2
    honest = laws.drawn_trees(shape, distribution(world))

    def discarding(prefix: Prefix) -> list[Proposal]:
        changed = []
        for proposal in honest(prefix):
            tokens = list(proposal.tokens)
            for depth in (1, 2):
                probs = dict(zip(*proposal.draft[depth - 1], strict=True))
                if tokens[depth] == ABSENT or probs[tokens[depth]] < 0.3:
                    tokens[depth:] = [ABSENT] * (3 - depth)
                    break
            changed.append(Proposal(weight=proposal.weight, tokens=tuple(tokens), draft=proposal.draft))
        return changed

    assert law_error(kind(shape), world, 2, first=discarding) > WRONG


def test_named_siblings_judged_as_drawn() -> None:
    """The draft's best ranks at a node, verified with its probabilities."""
    world, soft = WORLDS["V=3"], distribution(WORLDS["V=3"])
    named = laws.named_trees(COMB, world.ranked)

    def propose(prefix: Prefix) -> list[Proposal]:
        (proposal,) = named(prefix)
        told = [soft((*prefix, *(proposal.tokens[n] for n in COMB.path(node)))) for node in inner_nodes(COMB)]
        return [Proposal(weight=1, tokens=proposal.tokens, draft=tuple(told))]

    assert law_error(RejectionRule(COMB), world, 2, first=propose) > 0.05


def test_siblings_tried_out_of_order() -> None:
    world = WORLDS["V=3"]
    honest = laws.drawn_trees(TreeShape.comb(1, siblings=1), distribution(world))

    def swapped(prefix: Prefix) -> list[Proposal]:
        return [
            Proposal(weight=p.weight, tokens=(p.tokens[0], p.tokens[2], p.tokens[1]), draft=p.draft)
            for p in honest(prefix)
        ]

    assert law_error(RejectionRule(TreeShape.comb(1, siblings=1)), world, 1, first=swapped) > WRONG


def test_one_uniform_for_the_whole_chain() -> None:
    """Candidates accepted by the same number: the later ones pass too often."""
    world = WORLDS["V=3"]

    class OneNumber(RejectionRule):
        def chances(self, target_probs: Tensor, tokens: Tensor, draft: DraftProbs) -> Tensor:
            honest = super().chances(target_probs, tokens, draft)
            first, second = honest.unbind(-1)
            # Given the first passed, the second passes iff the number lies below both thresholds.
            return torch.stack([first, torch.minimum(first, second) / first.clamp(min=1e-300)], -1)

        def verify(self, target_probs: Tensor, tokens: Tensor, draft: DraftProbs, uniforms: Tensor) -> BonusLaw:
            passes = uniforms < self.chances(target_probs, tokens, draft)
            return super().verify(target_probs, tokens, draft, torch.where(passes, 1e-9, 1 - 1e-9))

    proposer = laws.drawn_trees(CHAIN2, distribution(world))
    found = laws.sequence_law(OneNumber(CHAIN2), world.target, START, 2, first=proposer)
    assert laws.error(found, laws.target_law(world.target, START, 2)) > WRONG
