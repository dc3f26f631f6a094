"""Cases of the exact laws: toy worlds, and every rule and case with its error.

``benchmarks/laws.py`` prints the largest error for each rule and case; ``tests/unit/decoding/test_laws.py`` checks
them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...decoding.forecast.base import ConfidenceForecast, FanOutForecast, Forecast, fan_out
from ...decoding.trees.shape import TreeShape
from ...decoding.verify.draft_probs import DraftProbs
from ...decoding.verify.saguaro import downscale
from . import coupled as coupled_laws
from . import enumerated as laws
from .enumerated import BlockRule, Prefix, RejectionRule, Rule, Weights

START: Prefix = (0,)
EXACT = 1e-12


class World:
    """A target and a draft over V tokens that are related but differ; ``holes``: tokens of probability 0."""

    def __init__(self, vocabulary: int, seed: int = 0, *, holes: bool = False, temperature: float = 1.0):
        self.vocabulary, self.seed, self.holes, self.temperature = vocabulary, seed, holes, temperature
        self.target = cache(lambda prefix: self._law(prefix, 0).softmax(-1).tolist())
        self.draft_logits = cache(lambda prefix: self._law(prefix, 1))
        self.draft = cache(lambda prefix: self.draft_logits(prefix).softmax(-1).tolist())
        self.target_counts = cache(lambda prefix: _counts(self.target(prefix)))
        self.draft_counts = cache(lambda prefix: _counts(self.draft(prefix)))

    def _law(self, prefix: Prefix, side: int) -> Tensor:
        def normal(*key: int) -> Tensor:
            generator = torch.Generator().manual_seed(hash((self.seed, *key, *prefix)) % 2**31)
            return torch.randn(self.vocabulary, generator=generator, dtype=torch.float64)

        logits = (normal(7) + 0.8 * normal(side)) / self.temperature
        if self.holes:
            logits[int(normal(side + 2).argmax())] = -torch.inf
        return logits

    def ranked(self, prefix: Prefix) -> list[int]:
        """Returns all tokens, the draft's most probable first."""
        return self.draft_logits(prefix).argsort(descending=True).tolist()


def _counts(law: list[float]) -> tuple[int, ...]:
    """Rounds a law to integer weights of sum ``GRID``, by largest remainder."""
    exact = [p * coupled_laws.GRID for p in law]
    counts = [int(value) for value in exact]
    rest = sorted(range(len(law)), key=lambda t: counts[t] - exact[t])
    for token in rest[: coupled_laws.GRID - sum(counts)]:
        counts[token] += 1
    return tuple(counts)


def law_error(rule: Rule, world: World, count: int, **proposers: Any) -> float:
    """Returns the largest error of a probability of ``count`` tokens; takes the arguments of ``sequence_law``."""
    law = laws.sequence_law(rule, world.target, START, count, **proposers)
    missing = abs(sum(law.values()) - 1)
    return max(missing, laws.error(law, laws.target_law(world.target, START, count)))


def weights(logits: Tensor, support: int = 99) -> Weights:
    found = DraftProbs.of_logits(logits, support)
    return tuple(found.tokens.tolist()), tuple(found.probs.tolist())


def distribution(world: World, *, support: int = 99, scale: float = 1.0, count: int = 0) -> Callable[[Prefix], Weights]:
    """Returns the draft's distribution: the forecast's tokens scaled down, then cut to its most probable tokens."""
    return cache(lambda prefix: weights(downscale(world.draft_logits(prefix), count, scale), support))


def ngram(prefix: Prefix) -> list[int]:
    """Returns the token that followed the previous occurrence of the last token, as n-grams do."""
    found = [prefix[i + 1] for i in range(len(prefix) - 1) if prefix[i] == prefix[-1]]
    return found[-1:]


CHAIN2, CHAIN3 = TreeShape.comb(2), TreeShape.comb(3)
COMB = TreeShape.comb(2, siblings=1)
WIDE = TreeShape.comb(1, siblings=2)
BUSH = TreeShape((0, 0, 1, 1, 2))  # a tree that is no comb
SHAPES = {"chain of 2": CHAIN2, "chain of 3": CHAIN3, "comb 2+1": COMB, "1 of 3": WIDE, "bush": BUSH}
CHAINS = ("chain of 2", "chain of 3")
WORLDS = {
    "V=3": World(3),
    "V=4": World(4, 1),
    "V=4, m": World(4, 5),
    "holes": World(4, 2, holes=True),
    "cold": World(3, 3, temperature=0.3),
}
KINDS: dict[str, type[Rule]] = {"rejection": RejectionRule, "block": BlockRule}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    rule: str
    shape: str
    name: str
    """The kind of case, a column of the table."""
    detail: str
    run: Callable[[], tuple[float, set[str]]]
    """Returns the largest error of a probability, and which of hit and miss occurred after the first round."""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.rule, self.shape, self.name, self.detail))).replace(" ", "_")


def cases() -> Iterator[Case]:
    """Yields all cases: coupled and rejection over chains and trees, block over chains."""
    for rule, shape in [("coupled", s) for s in SHAPES] + [("rejection", s) for s in SHAPES]:
        yield from (_coupled if rule == "coupled" else _compared)(rule, shape)
    for shape in CHAINS:
        yield from _compared("block", shape)


def forecasts(shape: TreeShape) -> dict[str, Forecast]:
    return {
        "2 fixed": FanOutForecast(shape, fan_out(shape, 2)),
        "2 confident": ConfidenceForecast(shape, 2, 1.0),
        "4 fixed": FanOutForecast(shape, fan_out(shape, 4)),
    }


def _compared(rule: str, name: str) -> Iterator[Case]:
    """Yields the cases of rules that compare probabilities, enumerated in float64."""
    shape, kind = SHAPES[name], KINDS[rule]

    def case(of: str, detail: str, world: str, count: int, first: laws.Proposer, **more: Any) -> Case:
        def run() -> tuple[float, set[str]]:
            happened: set[str] = set()

            def seen(origin: str, proposer: laws.Proposer) -> laws.Proposer:
                return lambda prefix: happened.add(origin) or proposer(prefix)

            hit, miss = (seen(o, more.get(o, first)) for o in ("hit", "miss"))
            given: dict[str, Any] = more | {"first": first, "hit": hit, "miss": miss}
            return law_error(kind(shape), WORLDS[world], count, **given), happened

        return Case(rule=rule, shape=name, name=of, detail=detail, run=run)

    def drawn(world: World, **how: Any) -> laws.Proposer:
        return laws.drawn_trees(shape, distribution(world, **how))

    for key in ("V=3", "V=4", "holes", "cold"):
        yield case("full rows", key, key, min(shape.depth + 1, 3), drawn(WORLDS[key]))
    for support in (1, 2, 3):
        yield case("compact support", f"m={support}", "V=4, m", 3, drawn(WORLDS["V=4, m"], support=support))
    world = WORLDS["V=3"]
    for scale in (1e-6, 0.05, 0.5):
        for support in (2, 99):
            yield case(
                "Saguaro", f"C={scale:g}, m={support}", "V=3", 3, drawn(world, support=support, scale=scale, count=1)
            )
    for key in ("V=3", "holes"):
        yield case("greedy draft", key, key, 3, laws.named_trees(shape, WORLDS[key].ranked))
    yield case("n-gram draft", "", "V=3", 4, laws.named_trees(shape, ngram))
    for threshold in (0.3, 0.5):
        early = laws.drawn_trees(shape, distribution(world), stop_after=lambda _p, prob, t=threshold: prob < t)
        yield case("early stop", f"{threshold:g}", "V=3", 3, early)
    misses = {
        "jit": drawn(world, support=2),
        "n-gram": laws.named_trees(shape, ngram),
        "none": laws.nothing_proposed(shape),
    }
    for fallback, miss in misses.items():
        for detail, forecast in forecasts(shape).items():
            guesses = laws.forecast_guesses(shape, forecast, world.draft)
            hit = drawn(world, scale=0.3, count=1)
            yield case(f"hit and {fallback}", detail, "V=3", 4, miss, hit=hit, miss=miss, guesses=guesses)


def _coupled(rule: str, name: str) -> Iterator[Case]:
    """Yields the cases of coupled verification, counted in fractions."""
    shape = SHAPES[name]

    def case(of: str, detail: str, key: str, first: coupled_laws.CoupledProposer, **more: Any) -> Case:
        def run() -> tuple[float, set[str]]:
            happened: set[str] = set()

            def seen(origin: str, proposer: coupled_laws.CoupledProposer) -> coupled_laws.CoupledProposer:
                return lambda prefix, noise: happened.add(origin) or proposer(prefix, noise)

            hit, miss = (seen(o, more.get(o, first)) for o in ("hit", "miss"))
            target = WORLDS[key].target_counts
            given: dict[str, Any] = more | {"hit": hit, "miss": miss}
            law = coupled_laws.sequence_law(shape, target, START, 3, first=first, **given)
            return coupled_laws.error(law, coupled_laws.target_law(target, START, 3)), happened

        return Case(rule=rule, shape=name, name=of, detail=detail, run=run)

    for key in ("V=3", "V=4", "holes", "cold"):
        yield case("full rows", key, key, coupled_laws.drafted(shape, WORLDS[key].draft_counts))
    world = WORLDS["V=3"]
    for key in ("V=3", "holes"):
        yield case("greedy draft", key, key, coupled_laws.named(shape, WORLDS[key].ranked))
    yield case("n-gram draft", "", "V=3", coupled_laws.named(shape, ngram))
    for least in (2, 3):
        yield case("early stop", f"{least}", "V=3", coupled_laws.drafted(shape, world.draft_counts, least=least))
    jit = coupled_laws.drafted(shape, world.draft_counts)
    misses = {
        "jit": jit,
        "n-gram": coupled_laws.named(shape, ngram),
        "none": coupled_laws.named(shape, lambda _prefix: []),
    }
    for fallback, miss in misses.items():
        for detail, forecast in forecasts(shape).items():
            given: dict[str, Any] = {"hit": jit, "miss": miss, "forecast": forecast, "draft": world.draft_counts}
            yield case(f"hit and {fallback}", detail, "V=3", miss, **given)


def table(errors: dict[tuple[str, str], dict[str, list[float]]]) -> str:
    """Returns a Markdown table: a row for each rule and shape, a column for each case with count and largest error."""
    columns = list(dict.fromkeys(name for row in errors.values() for name in row))
    lines = ["| rule | tree | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 2)]
    for (rule, shape), row in errors.items():
        cells = [f"{max(row[name]):.1e}" if name in row else "" for name in columns]
        lines.append(f"| {rule} | {shape} | " + " | ".join(cell.replace("0.0e+00", "0") for cell in cells) + " |")
    every = [value for row in errors.values() for found in row.values() for value in found]
    return "\n".join([*lines, "", f"{len(every)} laws, largest error {max(every):.1e}."])
