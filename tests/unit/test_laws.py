"""Laws, not samples: what the rules emit has the target's joint law, by exact enumeration.

And the mistakes one makes here, each shown to fail: a harness that passes everything proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from ssd.decoding.block import verify_block
from ssd.decoding.forecast import ConfidenceForecast, FanOutForecast, fan_out
from ssd.decoding.noise import ACCEPT_STREAM, DRAFT_STREAM, derive, gumbel, uniform
from ssd.decoding.rejection import BonusLaw, Siblings, draw_bonus, inner_nodes, node_laws, verify_rejection
from ssd.decoding.saguaro import downscale
from ssd.decoding.support import DraftProbs
from ssd.decoding.tree import ABSENT, TreeShape
from ssd.testing import laws
from ssd.testing.laws import BlockRule, Prefix, Proposal, RejectionRule, Rule, Weights

EXACT = 1e-12
WRONG = 1e-3
START: Prefix = (0,)


class World:
    """A target and a draft over V tokens, related but not close; ``holes`` of probability 0."""

    def __init__(self, vocabulary: int, seed: int = 0, *, holes: bool = False, temperature: float = 1.0):
        self.vocabulary, self.seed, self.holes, self.temperature = vocabulary, seed, holes, temperature
        self.target = cache(lambda prefix: self._law(prefix, 0).softmax(-1).tolist())
        self.draft_logits = cache(lambda prefix: self._law(prefix, 1))
        self.draft = cache(lambda prefix: self.draft_logits(prefix).softmax(-1).tolist())

    def _law(self, prefix: Prefix, side: int) -> Tensor:
        def normal(*key: int) -> Tensor:
            generator = torch.Generator().manual_seed(hash((self.seed, *key, *prefix)) % 2**31)
            return torch.randn(self.vocabulary, generator=generator, dtype=torch.float64)

        logits = (normal(7) + 0.8 * normal(side)) / self.temperature
        if self.holes:
            logits[int(normal(side + 2).argmax())] = -torch.inf
        return logits


def weights(logits: Tensor, support: int = 99) -> Weights:
    found = DraftProbs.of_logits(logits, support)
    return tuple(found.tokens.tolist()), tuple(found.probs.tolist())


@cache
def distribution(world: World, *, support: int = 99, scale: float = 1.0, count: int = 0) -> Callable[[Prefix], Weights]:
    """What the draft draws from: scaled below its forecast, then its most probable tokens."""
    return cache(lambda prefix: weights(downscale(world.draft_logits(prefix), count, scale), support))


def ranked(world: World) -> Callable[[Prefix], list[int]]:
    return cache(lambda prefix: world.draft_logits(prefix).argsort(descending=True).tolist())


def ngram(prefix: Prefix) -> list[int]:
    """What followed the last token when it stood in the prefix before."""
    found = [prefix[i + 1] for i in range(len(prefix) - 1) if prefix[i] == prefix[-1]]
    return found[-1:]


CHAIN2, CHAIN3 = TreeShape.comb(2), TreeShape.comb(3)
COMB = TreeShape.comb(2, siblings=1)
WIDE = TreeShape.comb(1, siblings=2)
BUSH = TreeShape((0, 0, 1, 1, 2))  # a tree that is no comb
WORLDS = {
    "V=3": World(3),
    "V=4": World(4, 1),
    "holes": World(4, 2, holes=True),
    "cold": World(3, 3, temperature=0.3),
}
RULES = [(RejectionRule, CHAIN2), (RejectionRule, CHAIN3), (BlockRule, CHAIN2), (BlockRule, CHAIN3)]
TREES = [(RejectionRule, COMB), (RejectionRule, WIDE), (RejectionRule, BUSH)]


def ids(value: object) -> str:
    if isinstance(value, type):
        return value.__name__.removesuffix("Rule").lower()
    return str(value.parents) if isinstance(value, TreeShape) else str(value)


def error(rule: Rule, world: World, count: int, **proposers: object) -> float:
    found = laws.sequence_law(rule, world.target, START, count, **proposers)  # type: ignore[arg-type]
    assert sum(found.values()) == pytest.approx(1, abs=EXACT)
    return laws.error(found, laws.target_law(world.target, START, count))


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize(("kind", "shape"), RULES + TREES, ids=ids)
def test_full_rows(kind: type[Rule], shape: TreeShape, world: World) -> None:
    count = min(shape.depth + 1, 3)
    assert error(kind(shape), world, count, first=laws.drawn_trees(shape, distribution(world))) <= EXACT


@pytest.mark.parametrize("support", [1, 2, 3])
@pytest.mark.parametrize(("kind", "shape"), RULES + TREES, ids=ids)
def test_compact_support(kind: type[Rule], shape: TreeShape, support: int) -> None:
    """The renormalised top m *is* the draft's distribution. With m = 1 it is a point mass, and a
    sibling has nothing left to be drawn from."""
    world = World(4, 5)
    proposer = laws.drawn_trees(shape, distribution(world, support=support))
    assert error(kind(shape), world, 3, first=proposer) <= EXACT


@pytest.mark.parametrize("scale", [1e-6, 0.05, 0.5])
@pytest.mark.parametrize("support", [2, 99])
@pytest.mark.parametrize(("kind", "shape"), [*RULES, TREES[0]], ids=ids)
def test_saguaro(kind: type[Rule], shape: TreeShape, support: int, scale: float) -> None:
    world = WORLDS["V=3"]
    drawn = distribution(world, support=support, scale=scale, count=1)
    assert error(kind(shape), world, 3, first=laws.drawn_trees(shape, drawn)) <= EXACT


@pytest.mark.parametrize(("kind", "shape"), RULES + TREES, ids=ids)
@pytest.mark.parametrize("world", [WORLDS["V=3"], WORLDS["holes"]], ids=["V=3", "holes"])
def test_named_candidates(kind: type[Rule], shape: TreeShape, world: World) -> None:
    """A deterministic draft: its best tokens at every node, no probabilities at all."""
    assert error(kind(shape), world, 3, first=laws.named_trees(shape, ranked(world))) <= EXACT


@pytest.mark.parametrize("kind", [RejectionRule, BlockRule], ids=ids)
def test_a_point_mass_spelled_out_is_a_named_candidate(kind: type[Rule]) -> None:
    world, rule = WORLDS["V=3"], kind(CHAIN2)
    (named,) = laws.named_trees(CHAIN2, ranked(world))(START)
    spelled = Proposal(weight=1, tokens=named.tokens, draft=tuple(((t,), (1.0,)) for t in named.tokens[1:]))
    one, other = (laws.round_law(rule, world.target, START, [proposal]) for proposal in (named, spelled))
    assert one == other
    assert {node for _, node, _ in one} == {0, 1, 2}


@pytest.mark.parametrize(("budget", "fixed"), [(2, True), (2, False), (4, True)])
@pytest.mark.parametrize("fallback", ["jit", "none", "ngram"])
@pytest.mark.parametrize(("kind", "shape"), [*RULES[::2], TREES[0]], ids=ids)
def test_hits_and_misses(kind: type[Rule], shape: TreeShape, fallback: str, budget: int, fixed: bool) -> None:
    """Rounds after hits and after misses, forecast by the pipeline's own code, Saguaro scaled: the
    forecast depends on the candidates, and the next candidates on whether it hit."""
    world, rule = WORLDS["V=3"], kind(shape)
    forecast = FanOutForecast(shape, fan_out(shape, budget)) if fixed else ConfidenceForecast(shape, budget, 1.0)
    guesses = laws.forecast_guesses(shape, forecast, world.draft)
    hit = laws.drawn_trees(shape, distribution(world, scale=0.3, count=1))
    miss = {
        "jit": laws.drawn_trees(shape, distribution(world, support=2)),
        "none": laws.nothing_proposed(shape),
        "ngram": laws.named_trees(shape, ngram),
    }[fallback]
    happened = set()

    def seen(proposer: laws.Proposer, kind: str) -> laws.Proposer:
        def propose(prefix: Prefix) -> list[Proposal]:
            happened.add(kind)
            return proposer(prefix)

        return propose

    wrong = error(rule, world, 4, first=miss, hit=seen(hit, "hit"), miss=seen(miss, "miss"), guesses=guesses)
    assert wrong <= EXACT
    assert happened == {"hit", "miss"}


@pytest.mark.parametrize("threshold", [0.3, 0.5])
@pytest.mark.parametrize(("kind", "shape"), RULES + TREES[:1], ids=ids)
def test_early_stop(kind: type[Rule], shape: TreeShape, threshold: float) -> None:
    """Drafting ends after a token of low confidence, which is still verified: the stop may depend
    on the very token."""
    world = WORLDS["V=3"]

    def stop(_prefix: Prefix, prob: float) -> bool:
        return prob < threshold

    proposer = laws.drawn_trees(shape, distribution(world), stop_after=stop)
    lengths = {sum(token != ABSENT for token in proposal.tokens) for proposal in proposer(START)}
    assert len(lengths) > 1
    assert error(kind(shape), world, 3, first=proposer) <= EXACT


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
    """More hits after a rejection; of a draft that is right, fewer acceptances: what it is for."""
    world, shape = WORLDS["V=4"], TreeShape.comb(1)
    best = ranked(world)(START)[0]
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


# The mistakes. Each is a rule or a proposer with one thing wrong.


def mistaken(rule: Rule, change: Callable[..., BonusLaw]) -> Rule:
    """``change(target_probs, tokens, draft, outcome)`` instead of the outcome."""
    verify = rule.verify

    def wrong(target_probs: Tensor, tokens: Tensor, draft: DraftProbs, uniforms: Tensor) -> BonusLaw:
        return change(target_probs, tokens, draft, verify(target_probs, tokens, draft, uniforms))

    rule.verify = wrong  # type: ignore[method-assign]
    return rule


@pytest.mark.parametrize("kind", [RejectionRule, BlockRule], ids=ids)
@pytest.mark.parametrize("by", [-1, 1])
def test_mistake_residual_off_by_one(kind: type[Rule], by: int) -> None:
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


@pytest.mark.parametrize("kind", [RejectionRule, BlockRule], ids=ids)
def test_mistake_bonus_from_the_target_after_a_rejection(kind: type[Rule]) -> None:
    def change(target_probs: Tensor, tokens: Tensor, _draft: DraftProbs, outcome: BonusLaw) -> BonusLaw:
        return outcome._replace(probs=target_probs[torch.arange(len(tokens)), outcome.node])

    world = WORLDS["V=3"]
    proposer = laws.drawn_trees(CHAIN2, distribution(world))
    assert error(mistaken(kind(CHAIN2), change), world, 2, first=proposer) > WRONG


@pytest.mark.parametrize("kind", [RejectionRule, BlockRule], ids=ids)
def test_mistake_temperature_on_one_side(kind: type[Rule]) -> None:
    """Drawn at one temperature, judged by the probabilities at another."""
    world = WORLDS["V=3"]

    def at_half(prefix: Prefix) -> Weights:
        return weights(world.draft_logits(prefix) / 0.5)

    wrong = laws.drawn_trees(CHAIN2, at_half, judged_by=distribution(world))
    assert error(kind(CHAIN2), world, 2, first=wrong) > WRONG
    right = laws.drawn_trees(CHAIN2, at_half)
    assert error(kind(CHAIN2), world, 2, first=right) <= EXACT


@pytest.mark.parametrize("kind", [RejectionRule, BlockRule], ids=ids)
def test_mistake_the_scaled_row_stays_at_home(kind: type[Rule]) -> None:
    """Saguaro's scaled row is drawn from, and the verifier is told the unscaled one."""
    world = WORLDS["V=3"]
    scaled, plain = distribution(world, scale=0.3, count=1), distribution(world)
    assert error(kind(CHAIN2), world, 2, first=laws.drawn_trees(CHAIN2, scaled, judged_by=plain)) > WRONG


@pytest.mark.parametrize("kind", [RejectionRule, BlockRule], ids=ids)
def test_mistake_the_support_is_not_renormalised(kind: type[Rule]) -> None:
    """Drawn from the top m, judged by the whole row."""
    world = WORLDS["V=4"]
    compact, whole = distribution(world, support=2), distribution(world)
    assert error(kind(CHAIN2), world, 2, first=laws.drawn_trees(CHAIN2, compact, judged_by=whole)) > WRONG


@pytest.mark.parametrize("kind", [RejectionRule, BlockRule], ids=ids)
def test_mistake_the_unlikely_token_is_thrown_away(kind: type[Rule]) -> None:
    """Stopping *before* a token because of which it is: what is left was selected."""
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

    assert error(kind(shape), world, 2, first=discarding) > WRONG


def test_mistake_named_siblings_judged_as_drawn() -> None:
    """The draft's top ranks at a node, judged by its soft probabilities."""
    world, soft = WORLDS["V=3"], distribution(WORLDS["V=3"])
    named = laws.named_trees(COMB, ranked(world))

    def propose(prefix: Prefix) -> list[Proposal]:
        (proposal,) = named(prefix)
        told = [soft((*prefix, *(proposal.tokens[n] for n in COMB.path(node)))) for node in inner_nodes(COMB)]
        return [Proposal(weight=1, tokens=proposal.tokens, draft=tuple(told))]

    assert error(RejectionRule(COMB), world, 2, first=propose) > 0.05


def test_a_repeated_sibling_is_a_waste_and_no_mistake() -> None:
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

    assert error(RejectionRule(shape), world, 2, first=propose) <= EXACT


def test_mistake_siblings_tried_out_of_order() -> None:
    world = WORLDS["V=3"]
    honest = laws.drawn_trees(TreeShape.comb(1, siblings=1), distribution(world))

    def swapped(prefix: Prefix) -> list[Proposal]:
        return [
            Proposal(weight=p.weight, tokens=(p.tokens[0], p.tokens[2], p.tokens[1]), draft=p.draft)
            for p in honest(prefix)
        ]

    assert error(RejectionRule(TreeShape.comb(1, siblings=1)), world, 1, first=swapped) > WRONG


def test_mistake_one_uniform_for_the_whole_chain() -> None:
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


# Mistakes with noise cannot be enumerated, since they break the independence that the enumeration
# takes for granted: samples, many, vectorised.

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
def test_mistake_noise_used_twice(keyed_by: str) -> None:
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
def test_mistake_noise_shared_with_the_bonus(with_the_bonus: str) -> None:
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


def test_mistake_accepting_at_ratio_zero() -> None:
    """The smallest uniform there is stays above 0 and is compared strictly. With a uniform that can
    be 0, ``uniform <= ratio`` emits tokens of probability 0."""
    shape = TreeShape.comb(1)
    rows = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]], dtype=torch.float64)
    drawn = DraftProbs(torch.arange(2)[None, None], torch.tensor([[[0.5, 0.5]]], dtype=torch.float64))
    impossible = torch.tensor([[1, 0]])
    smallest = (torch.zeros(1, 2, dtype=torch.float64) + 0.5) * 2.0**-31
    for uniforms in (torch.zeros(1, 2, dtype=torch.float64), smallest):
        assert int(verify_rejection(rows, impossible, drawn, uniforms, Siblings(shape)).node) == 0
        assert int(verify_block(rows, impossible[:, 1:], drawn, uniforms[:, 1:]).node) == 0
    chance = node_laws(rows, impossible, drawn, Siblings(shape)).accept[0, 1]
    assert chance == 0 and torch.zeros(()) <= chance  # what the mistake would accept
