"""The profile: costs of forwards on a machine, and how well the draft guesses. It is the simulator's input.

Costs are fitted to measured rounds of real pipelines. The content is a table (:class:`Replay`) or a random model
(:class:`Independent`). The table lists, for every position of measured texts, how many tokens a round that begins
there accepts and how large a forecast must be to hold its outcome.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...decoding.trees.widths import siblings_within
from ...errors import RequestError
from ...request.methods import Method

NEVER = 0
"""Value in ``needed`` of a replay: no forecast tried holds the outcome."""

ROOT = "0:1"
"""The tree of a round without candidates."""

LARGEST = 20.0
"""Logarithm of a budget larger than any draft's."""

Walk = Callable[[bool], tuple[int, int]]
"""Called once per round, with whether the round has no candidates (fallback ``none``). Returns the number of accepted
tokens, and the smallest budget that holds the outcome."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Line(_Part):
    """Seconds of a glue forward and K draft steps: ``base + per_node · nodes + per_step · K + per_row · K · rows``."""

    base: float = Field(default=0.0, ge=0)
    per_step: float = Field(default=0.0, ge=0)
    per_row: float = Field(default=0.0, ge=0)
    per_node: float = Field(default=0.0, ge=0)

    def seconds(self, steps: int, rows: float = 0.0, nodes: int = 0) -> float:
        return self.base + self.per_node * nodes + steps * (self.per_step + self.per_row * rows)


class Costs(_Part):
    """Costs in seconds, at one temperature (sampling takes longer than greedy choice)."""

    target: dict[int, float] = Field(min_length=1)
    """A forward of the target with a single sequence, by its number of rows."""
    sequence: float = Field(default=0.0, ge=0)
    """Added by each further sequence of the forward."""
    tree: Line
    """The draft's half of a round: glue forward, forecast, K steps. ``rows`` are sequences × branches, ``nodes`` the
    nodes of all trees."""
    jit: Line
    """Waiting for K tokens drafted after a miss."""
    sd: Line | None = None
    """The same in rounds of ``sd``, whose draft is idle during the forward; None: as ``jit``."""
    glue: float = Field(default=0.0, ge=0)
    """The draft's half of a round without a forecast (``sd``)."""
    overhead: dict[Literal["none", "sd", "ssd"], float]
    """Time of a round that does not wait for the draft, without its forward and the wait after a miss."""
    per_position: float = Field(default=0.0, ge=0)
    """Added to the overhead for each position of the lookahead, in rounds with a draft: noise is computed for all."""
    exchange: float = 0.0
    """Time of a round that waits for the draft, without the draft's time. Negative if the draft begins before the
    forward."""
    after_wait: float = 0.0
    """Added to a forward that follows a wait: its weights have left the caches."""
    tensor_parallel: dict[int, float] = {}
    """Measured speedups of the forward, by number of devices; others follow from ``efficiency``."""
    efficiency: float = Field(default=0.85, gt=0.5, le=1)
    """Assumed: twice as many devices run the forward 2 · efficiency times as fast."""

    def forward(self, rows: int, devices: int = 1, *, sequences: int = 1) -> float:
        """Returns the seconds of a target forward; linear between the measured numbers of rows and beyond them."""
        counts = sorted(self.target)
        if len(counts) == 1:
            whole = self.target[counts[0]]
        else:
            upper = min(max(bisect_left(counts, rows), 1), len(counts) - 1)
            low, high = counts[upper - 1], counts[upper]
            slope = (self.target[high] - self.target[low]) / (high - low)
            whole = max(self.target[low] + slope * (rows - low), min(self.target.values()) / 2)
        return (whole + (sequences - 1) * self.sequence) / self.speedup(devices)

    def speedup(self, devices: int) -> float:
        """Returns the speedup of a forward that is split over ``devices``."""
        if devices == 1:
            return 1.0
        return self.tensor_parallel.get(devices) or (2 * self.efficiency) ** math.log2(devices)


class Replay(_Part):
    """Rounds of measured texts, for every position and tree.

    Under coupled verification the tokens of a text, and so the tree drafted at a position, do not depend on the
    method. Only the positions at which rounds begin do. So replaying the table is exact.
    """

    kind: Literal["replay"] = "replay"
    accepted: dict[str, list[list[int]]]
    """Accepted tokens by tree (``"K:W"``: a comb of W rows; ``"0:1"``: the root alone), text and position."""
    needed: dict[str, list[list[int]]]
    """The smallest budget whose forecast holds the outcome, in the same order; ``NEVER`` if none does."""

    @property
    def texts(self) -> int:
        return len(self.accepted[ROOT])

    @property
    def trees(self) -> list[tuple[int, int]]:
        """(K, W) known."""
        found = (tree.split(":") for tree in self.accepted if tree != ROOT)
        return sorted((int(depth), int(rows)) for depth, rows in found)

    def walk(self, lookahead: int, rows: int, text: int) -> Walk:
        name = f"{lookahead}:{rows}"
        if name not in self.accepted:
            raise RequestError(
                f"the profile has no tree of lookahead {lookahead} with {rows} rows; measure one that has"
            )
        position = 0

        def step(plain: bool = False) -> tuple[int, int]:
            nonlocal text, position
            # The first round of a sequence has no candidates.
            tree = ROOT if plain or not position else name
            which = text % self.texts
            length = len(self.accepted[ROOT][which])
            accepted, needed = self.accepted[tree][which][position], self.needed[tree][which][position]
            accepted = min(accepted, length - position - 1)
            position += accepted + 1
            if position >= length:
                text, position = text + 1, 0
            return accepted, needed

        return step


class Independent(_Part):
    """A random model: every token is accepted with the same probability, and a forecast of N outcomes misses with
    probability ``min(1, miss · N^-power)`` (the power law of Saguaro, arXiv 2603.03251)."""

    kind: Literal["independent"] = "independent"
    acceptance: float = Field(ge=0, le=1)
    miss: float = Field(default=1.0, ge=0)
    power: float = Field(default=1.0, gt=0)
    sibling_share: float = Field(default=0.35, ge=0, lt=1)
    """Probability that the best sibling is right where the chain is wrong; it halves with each further rank."""

    @property
    def texts(self) -> int:
        return 16

    @property
    def trees(self) -> list[tuple[int, int]]:
        return [(depth, rows) for depth in range(1, 17) for rows in range(depth + 1, 2 + 5 * depth)]

    def walk(self, lookahead: int, rows: int, text: int) -> Walk:
        draw = random.Random(text)
        beside = [
            1 - math.prod(1 - self.sibling_share / 2**rank for rank in range(count))
            for count in siblings_within(rows, lookahead)
        ]

        def step(plain: bool = False) -> tuple[int, int]:
            accepted = 0
            depth = 0 if plain else lookahead
            while accepted < depth and draw.random() < self.acceptance:
                accepted += 1
            if accepted < depth and draw.random() < beside[accepted]:
                accepted += 1
            if not self.miss:
                return accepted, 1
            left = max(1 - draw.random(), 1e-12)  # budgets hit whose miss rate is below this
            exponent = math.log(self.miss / left) / self.power
            return accepted, max(1, math.ceil(math.exp(min(exponent, LARGEST))))

        return step


Content = Annotated[Replay | Independent, Field(discriminator="kind")]


class Point(_Part):
    """Means over the rounds of one real run, in seconds; the costs are fitted to them."""

    method: Method
    temperature: float
    lookahead: int
    budget: int
    batch: int
    rows: int
    """Rows of the target's forward, over all sequences; plain rounds count without padding."""
    rounds: int
    forward_s: float
    draft_s: float | None
    jit_s: float | None
    overhead_s: float | None
    """None, here and in ``exchange_s``: too few rounds of that kind."""
    exchange_s: float | None = None
    after_wait_s: float | None
    start: int = 0
    """Number of the pipeline, among those started for the profile."""


class Profile(_Part):
    """What :mod:`ssd.bench.simulate.calibrate` writes."""

    name: str
    machine: str = ""
    costs: dict[str, Costs]
    """By temperature, written ``"0"``, ``"1"``, …"""
    padded: bool = True
    """Whether plain rounds of ``none`` are padded to the rows of a verification."""
    content: dict[str, Content]
    points: list[Point] = []

    def at(self, temperature: float) -> tuple[Costs, Replay | Independent]:
        """Returns costs and content of the nearest measured temperature."""

        def nearest(names: dict) -> str:
            return min(names, key=lambda name: abs(float(name) - temperature))

        return self.costs[nearest(self.costs)], self.content[nearest(self.content)]


def load_profile(path: str | Path) -> Profile:
    """Reads a profile. Raises RequestError if the file cannot be read or is not a profile."""
    try:
        return Profile.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(
            f"profile {str(path)!r} cannot be read ({error.strerror}); ssd plan --measure writes one"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RequestError(f"profile {str(path)!r}: {where}: {first['msg']}") from None


def survival(content: Replay | Independent, lookahead: int, rows: int) -> list[float]:
    """Returns the shares of rounds that accept at least 1, 2, …, K tokens."""
    counts, rounds = [0] * (lookahead + 1), 0
    for accepted, _ in _rounds(content, lookahead, rows):
        rounds += 1
        for depth in range(1, accepted + 1):
            counts[depth] += 1
    return [count / rounds for count in counts[1:]]


def hit_curve(content: Replay | Independent, lookahead: int, rows: int, budgets: list[int]) -> list[float]:
    """Returns the hit rate with each budget."""
    needed = [need for _, need in _rounds(content, lookahead, rows)]
    return [sum(NEVER < need <= budget for need in needed) / len(needed) for budget in budgets]


def _rounds(content: Replay | Independent, lookahead: int, rows: int, each: int = 200) -> Iterator[tuple[int, int]]:
    for text in range(content.texts):
        walk = content.walk(lookahead, rows, text)
        for _ in range(each):
            yield walk(False)
