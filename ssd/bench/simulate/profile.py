"""A profile: what forwards cost on a machine and how well a draft guesses. Input of the simulator.

Costs are fits to measured rounds of real pipelines; the content is a table that says for every
position of measured texts what a round beginning there accepts and how large a forecast must be to
hold its outcome (:class:`Replay`), or a law (:class:`Independent`).
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
"""In a replay's ``needed``: no forecast that was tried holds the outcome."""

ROOT = "0:1"
"""The tree of a round without candidates."""

LARGEST = 20.0
"""Logarithm of a budget no draft has."""

Walk = Callable[[bool], tuple[int, int]]
"""Called once a round, with whether it has no candidates (fallback ``none``): tokens accepted, and
the budget that holds the outcome."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Line(_Part):
    """``base + per_node · nodes + per_step · K + per_row · K · rows`` seconds: a glue forward of so many nodes, and K
    draft steps of so many rows each."""

    base: float = Field(default=0.0, ge=0)
    per_step: float = Field(default=0.0, ge=0)
    per_row: float = Field(default=0.0, ge=0)
    per_node: float = Field(default=0.0, ge=0)

    def seconds(self, steps: int, rows: float = 0.0, nodes: int = 0) -> float:
        return self.base + self.per_node * nodes + steps * (self.per_step + self.per_row * rows)


class Costs(_Part):
    """Seconds, at one temperature (choosing tokens costs more when it samples)."""

    target: dict[int, float] = Field(min_length=1)
    """One forward of the target, by its rows in all (sequences × rows each): of a single sequence's."""
    sequence: float = Field(default=0.0, ge=0)
    """What each further sequence of a forward adds to that."""
    tree: Line
    """The draft's half of a round: glue, forecast, K steps; ``rows`` are sequences × branches, ``nodes`` those of
    the trees."""
    jit: Line
    """Waiting for K tokens drafted after a miss."""
    sd: Line | None = None
    """The same in rounds of ``sd``, whose draft idles during the forward; None: as ``jit``."""
    glue: float = Field(default=0.0, ge=0)
    """The draft's half of a round without a forecast (``sd``)."""
    overhead: dict[Literal["none", "sd", "ssd"], float]
    """A round beyond its forward (and beyond the wait after a miss), where it does not wait for the draft."""
    per_position: float = Field(default=0.0, ge=0)
    """What each position of the lookahead adds to that in rounds of a draft: noise is made for all of them."""
    exchange: float = 0.0
    """A round beyond the draft's time, where it does. Below zero, if the draft begins before the forward."""
    after_wait: float = 0.0
    """How much longer a forward takes that follows a wait (its weights have left the caches)."""
    tensor_parallel: dict[int, float] = {}
    """Measured speed-ups of the forward by devices. Others: ``efficiency``."""
    efficiency: float = Field(default=0.85, gt=0.5, le=1)
    """Assumed where not measured: twice the devices run the forward 2 · efficiency times as fast."""

    def forward(self, rows: int, devices: int = 1, *, sequences: int = 1) -> float:
        """Seconds of a target forward: linear between measured row counts and beyond them."""
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
        """Of a tensor-parallel forward."""
        if devices == 1:
            return 1.0
        return self.tensor_parallel.get(devices) or (2 * self.efficiency) ** math.log2(devices)


class Replay(_Part):
    """Rounds of measured texts, for every position and tree.

    Under coupling the tokens of a text, and with them every tree drafted in it, do not depend on
    the method: only which positions rounds begin at does. So replaying a table is exact.
    """

    kind: Literal["replay"] = "replay"
    accepted: dict[str, list[list[int]]]
    """By tree (``"K:W"``, a comb of W rows; ``"0:1"`` is the bare root), text and position: tokens accepted."""
    needed: dict[str, list[list[int]]]
    """The smallest budget tried that forecasts the outcome; ``NEVER`` if none."""

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
                f"the profile knows no tree of lookahead {lookahead} with {rows} rows; measure one that does"
            )
        position = 0

        def step(plain: bool = False) -> tuple[int, int]:
            nonlocal text, position
            # A sequence's first round has nothing but its root.
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
    """A law instead of texts: every token is accepted with the same chance, and a forecast of N
    misses with chance ``min(1, miss · N^-power)`` (the power law of Saguaro, arXiv 2603.03251)."""

    kind: Literal["independent"] = "independent"
    acceptance: float = Field(ge=0, le=1)
    miss: float = Field(default=1.0, ge=0)
    power: float = Field(default=1.0, gt=0)
    sibling_share: float = Field(default=0.35, ge=0, lt=1)
    """Chance that the best sibling is right where the chain is wrong; each next rank half of it."""

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
            left = max(1 - draw.random(), 1e-12)  # hit from the budget on at which the miss rate is below this
            exponent = math.log(self.miss / left) / self.power
            return accepted, max(1, math.ceil(math.exp(min(exponent, LARGEST))))

        return step


Content = Annotated[Replay | Independent, Field(discriminator="kind")]


class Point(_Part):
    """Means over the rounds of one real run, seconds, as measured: what the costs were fitted to."""

    method: Method
    temperature: float
    lookahead: int
    budget: int
    batch: int
    rows: int
    """Of the target's forward: of all its sequences; of plain rounds unpadded."""
    rounds: int
    forward_s: float
    draft_s: float | None
    jit_s: float | None
    overhead_s: float | None
    """None, as ``exchange_s``: too few such rounds."""
    exchange_s: float | None = None
    after_wait_s: float | None
    start: int = 0
    """Of which pipeline, of those started for the profile."""


class Profile(_Part):
    """What :mod:`ssd.bench.simulate.calibrate` writes."""

    name: str
    machine: str = ""
    costs: dict[str, Costs]
    """By temperature, written ``"0"``, ``"1"``, .."""
    padded: bool = True
    """Whether plain rounds of ``none`` run as many rows as verifications."""
    content: dict[str, Content]
    points: list[Point] = []

    def at(self, temperature: float) -> tuple[Costs, Replay | Independent]:
        """Costs and content of the nearest temperature measured."""

        def nearest(names: dict) -> str:
            return min(names, key=lambda name: abs(float(name) - temperature))

        return self.costs[nearest(self.costs)], self.content[nearest(self.content)]


def load_profile(path: str | Path) -> Profile:
    """Raises: RequestError: there is no such file, or it is no profile."""
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
    """Chance that a round accepts at least 1, 2, .. K tokens."""
    counts, rounds = [0] * (lookahead + 1), 0
    for accepted, _ in _rounds(content, lookahead, rows):
        rounds += 1
        for depth in range(1, accepted + 1):
            counts[depth] += 1
    return [count / rounds for count in counts[1:]]


def hit_curve(content: Replay | Independent, lookahead: int, rows: int, budgets: list[int]) -> list[float]:
    """Hit rate with each budget."""
    needed = [need for _, need in _rounds(content, lookahead, rows)]
    return [sum(NEVER < need <= budget for need in needed) / len(needed) for budget in budgets]


def _rounds(content: Replay | Independent, lookahead: int, rows: int, each: int = 200) -> Iterator[tuple[int, int]]:
    for text in range(content.texts):
        walk = content.walk(lookahead, rows, text)
        for _ in range(each):
            yield walk(False)
