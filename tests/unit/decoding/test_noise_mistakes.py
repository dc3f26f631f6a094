"""Mistakes with noise. They cannot be enumerated, since they break the independence that the
enumeration takes for granted: samples, many, vectorised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssd.decoding.noise import ACCEPT_STREAM, DRAFT_STREAM, derive, gumbel, uniform
from ssd.decoding.verify.block import verify_block
from ssd.decoding.verify.draft_probs import DraftProbs
from ssd.decoding.verify.rejection import BonusLaw, draw_bonus
from ssd.decoding.verify.saguaro import downscale
from ssd.testing.laws import enumerated as laws
from ssd.testing.laws.cases import START, World
from ssd.testing.laws.enumerated import Prefix

DRAWS = 60_000


def two_tokens(first: Tensor, second: Tensor, world: World) -> float:
    """Pearson's statistic (8 degrees of freedom) of the first two tokens against their law."""
    counts = torch.bincount(first * 3 + second, minlength=9).double()
    law = laws.target_law(world.target, START, 2)
    expected = torch.tensor([law[a, b] for a in range(3) for b in range(3)]) * len(first)
    return float(((counts - expected) ** 2 / expected).sum())


def table(law: Callable[[Prefix], list[float]]) -> tuple[Tensor, Tensor, Tensor]:
    """Laws after START and one, two more tokens: ``[3]``, ``[3, 3]``, ``[3, 3, 3]``."""
    one = torch.tensor([law((*START, a)) for a in range(3)], dtype=torch.float64)
    two = torch.tensor([[law((*START, a, b)) for b in range(3)] for a in range(3)], dtype=torch.float64)
    return torch.tensor(law(START), dtype=torch.float64), one, two


@pytest.mark.parametrize("keyed_by", ["root", "position"])
def test_noise_used_twice(keyed_by: str) -> None:
    """Block verification, two rounds. Candidates beyond the accepted prefix had a say in the first
    outcome; drawing the second round's with the same noise of their position is wrong."""
    world, seeds = World(3, 11), torch.arange(DRAWS)
    target, draft = table(world.target), table(world.draft)

    def draw(probs: Tensor, root: int, depth: int) -> Tensor:
        own = derive(seeds, DRAFT_STREAM, root if keyed_by == "root" else 0)
        place = depth if keyed_by == "root" else root + depth
        noise = gumbel(own, torch.full_like(seeds, place), 3)
        return (probs.log() + noise).argmax(-1)

    def accept(root: int) -> Tensor:
        numbers = uniform(derive(seeds, ACCEPT_STREAM), torch.zeros_like(seeds), 4)
        fresh = uniform(derive(seeds, ACCEPT_STREAM), torch.full_like(seeds, root), 4)
        return fresh if keyed_by == "root" else numbers[:, root:]

    def bonus(outcome: BonusLaw, position: Tensor) -> Tensor:
        return draw_bonus(outcome, gumbel(seeds, position, 3))

    one = draw(draft[0].expand(DRAWS, 3), 0, 0)
    two = draw(draft[1][one], 0, 1)
    tokens = torch.arange(3).expand(DRAWS, 2, 3)
    rows = torch.stack([target[0].expand(DRAWS, 3), target[1][one], target[2][one, two]], 1)
    drawn = torch.stack([draft[0].expand(DRAWS, 3), draft[1][one]], 1)
    outcome = verify_block(rows, torch.stack([one, two], 1), DraftProbs(tokens, drawn), accept(0)[:, :2])
    last = bonus(outcome, outcome.node)
    first = torch.where(outcome.node > 0, one, last)
    # Where nothing was accepted: a second round, one candidate deep.
    again = draw(draft[1][first], 1, 0)
    rows = torch.stack([target[1][first], target[2][first, again]], 1)
    short = verify_block(rows, again[:, None], DraftProbs(tokens[:, :1], draft[1][first][:, None]), accept(1)[:, :1])
    later = torch.where(short.node > 0, again, bonus(short, torch.ones_like(seeds)))
    second = torch.where(outcome.node > 1, two, torch.where(outcome.node > 0, last, later))
    statistic = two_tokens(first, second, world)
    assert statistic < 26.1 if keyed_by == "root" else statistic > 100  # 26.1: p = 0.001


@pytest.mark.parametrize("with_the_bonus", ["nothing", "scaled token", "candidate"])
def test_noise_shared_with_the_bonus(with_the_bonus: str) -> None:
    """Saguaro's scaled token: the draft's most probable one, or (wrong) the one the forecast will
    guess, which it ranks with the noise the bonus token is drawn with. And (wrong) a candidate drawn
    with that noise itself."""
    world, seeds = World(3, 14), torch.arange(DRAWS)
    target, draft = table(world.target), table(world.draft)
    plain = gumbel(seeds, torch.zeros_like(seeds), 3)
    logits = draft[0].log().expand(DRAWS, 3)
    ranking = plain if with_the_bonus == "scaled token" else torch.zeros_like(plain)
    scaled = downscale(logits + ranking, 1, 0.05) - ranking
    law = DraftProbs.of_logits(scaled, 3)
    own = gumbel(derive(seeds, DRAFT_STREAM), torch.zeros_like(seeds), 3)
    candidate = law.draw(plain if with_the_bonus == "candidate" else own)
    rows = torch.stack([target[0].expand(DRAWS, 3), target[1][candidate[:, 0]]], 1)
    outcome = verify_block(
        rows, candidate, law[:, None], uniform(derive(seeds, ACCEPT_STREAM), torch.zeros_like(seeds), 1)
    )
    ahead = gumbel(seeds, torch.ones_like(seeds), 3)
    last = draw_bonus(outcome, torch.where(outcome.node[:, None] > 0, ahead, plain))
    first = torch.where(outcome.node > 0, candidate[:, 0], last)
    second = torch.where(outcome.node > 0, last, (target[1][first].log() + ahead).argmax(-1))
    statistic = two_tokens(first, second, world)
    assert statistic < 26.1 if with_the_bonus == "nothing" else statistic > 100
