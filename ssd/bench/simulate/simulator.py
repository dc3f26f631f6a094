"""Rounds without models: a discrete-event simulation of draft and verifier from a profile.

Verifier and draft meet at the exchange, as in the pipeline: a round ends when both have arrived. With fallback
``jit``, a batch in which a row missed then waits for tokens drafted now; with ``none``, that row continues with its
bonus token alone. The simulation reproduces closed forms (``tests/unit/bench/test_simulate.py``; Saguaro, arXiv
2603.03251, Theorem 7, with times in units of one verification): the speedup of ``sd`` is E / (1 + T_SD), that of
``ssd`` is [p E_hit + (1 - p) E_miss] / [p max(1, T_p) + (1 - p)(1 + T_b)], and a batch waits with probability
1 - p^b.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...errors import RequestError
from ...pipeline.transport.messages import RoundReport
from ...request.methods import WITH_DRAFT, Modelled
from .profile import NEVER, Costs, Independent, Profile, Replay

KEPT_ROUNDS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A method with its sizes, and the devices it runs on."""

    method: Modelled = "ssd"
    lookahead: int = 4
    budget: int = 12
    rows: int | None = None
    """W: verified rows per sequence, a comb within that budget; None: a chain."""
    batch: int = 1
    fallback: Literal["jit", "none"] = "jit"
    temperature: float = 0.0
    target_devices: int = 1
    """Devices the target is split over."""
    draft_devices: int = 1
    """Devices the forecast's branches are divided among."""

    @property
    def tree_rows(self) -> int:
        """W: verified rows per sequence."""
        return self.rows or self.lookahead + 1

    @property
    def devices(self) -> int:
        return self.target_devices + (self.draft_devices if self.method in WITH_DRAFT else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """The result of a simulation."""

    setting: Setting
    tokens: int
    seconds: float
    count: int
    """Number of rounds."""
    lookups: int
    hits: int
    verifier_busy_s: float
    draft_busy_s: float
    rounds: list[RoundReport]
    """The first ``KEPT_ROUNDS`` rounds, for a timeline."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def acceptance_length(self) -> float:
        return self.tokens / (self.count * self.setting.batch)

    @property
    def hit_rate(self) -> float | None:
        return self.hits / self.lookups if self.lookups else None


def simulate(profile: Profile, setting: Setting, *, tokens: int = 4000) -> Simulated:
    """Simulates one setting; see :meth:`Simulator.run`."""
    return Simulator(profile).run(setting, tokens=tokens)


class Simulator:
    """Simulates settings of one profile.

    The accepted tokens and the budgets that hold the outcomes are computed once for each tree and batch; budgets,
    devices and costs only change how long the rounds take.
    """

    def __init__(self, profile: Profile):
        self.profile = profile
        self._played: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    def run(self, setting: Setting, *, tokens: int = 4000) -> Simulated:
        """Simulates rounds until ``tokens`` are generated, over all sequences.

        Raises:
            RequestError: the profile does not have the tree, or a number of the setting is below 1.
        """
        if min(setting.target_devices, setting.draft_devices, setting.batch, setting.lookahead) < 1:
            raise RequestError("devices, batch and lookahead must be at least 1")
        costs, content = self.profile.at(setting.temperature)
        plain = setting.method == "none_fast" or (setting.method == "none" and not self.profile.padded)
        rows = setting.batch * (1 if plain else setting.tree_rows)
        bare_s = costs.forward(rows, setting.target_devices, sequences=setting.batch)
        if setting.method in ("none", "none_fast"):
            count = -(-tokens // setting.batch)
            made = np.full(count, setting.batch)
            nothing = np.zeros((count, setting.batch), dtype=bool)
            return _timed(setting, made, nothing, np.full(count, bare_s), costs.overhead["none"])
        made, needed = self._play(content, setting, tokens)
        ssd = setting.method == "ssd"
        hit = _hits(needed, setting)
        stalls = not ssd or setting.fallback == "jit"
        waited: np.ndarray = np.logical_not(hit.all(axis=1)) & stalls
        after = np.concatenate([[False], waited[:-1]])
        chain = costs.jit if ssd or costs.sd is None else costs.sd
        return _timed(
            setting,
            made,
            hit,
            bare_s + costs.after_wait * after,
            costs.overhead["ssd" if ssd else "sd"] + costs.per_position * setting.lookahead,
            draft_s=self._tree_s(costs, setting) if ssd else costs.glue,
            exchange_s=costs.exchange,
            wait_s=np.where(waited, chain.seconds(setting.lookahead), 0.0),
        )

    def _tree_s(self, costs: Costs, setting: Setting) -> float:
        share = -(-setting.budget // setting.draft_devices)
        return costs.tree.seconds(setting.lookahead, setting.batch * share, setting.batch * setting.tree_rows)

    def _play(self, content: Replay | Independent, setting: Setting, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of every round ``[R]``, and the budgets that hold its rows' outcomes ``[R, B]``."""
        # Without a fallback, a row that missed has no candidates, so the tokens depend on the budget.
        plainly = setting.method == "ssd" and setting.fallback == "none"
        key = (setting.temperature, setting.lookahead, setting.tree_rows, setting.batch, tokens)
        key = (*key, setting.budget if plainly else None)
        if key not in self._played:
            walks = [content.walk(setting.lookahead, setting.tree_rows, row) for row in range(setting.batch)]
            bare = [False] * setting.batch
            made, needed = [], []
            total = 0
            while total < tokens:
                results = [walk(plain) for walk, plain in zip(walks, bare, strict=True)]
                made.append(sum(accepted + 1 for accepted, _ in results))
                needed.append([budget for _, budget in results])
                total += made[-1]
                if plainly:
                    bare = [not NEVER < budget <= setting.budget for budget in needed[-1]]
            self._played[key] = np.array(made), np.array(needed)
        return self._played[key]


def _hits(needed: np.ndarray, setting: Setting) -> np.ndarray:
    if setting.method != "ssd":
        return np.zeros(needed.shape, dtype=bool)
    return (needed > NEVER) & (needed <= setting.budget)


def _timed(
    setting: Setting,
    made: np.ndarray,
    hit: np.ndarray,
    forward_s: np.ndarray,
    overhead_s: float,
    *,
    draft_s: float | None = None,
    exchange_s: float = 0.0,
    wait_s: np.ndarray | None = None,
) -> Simulated:
    """Returns the rounds with their times.

    Args:
        made: tokens of each round ``[R]``.
        hit: which rows hit ``[R, B]``.
        forward_s: seconds of each verification ``[R]``.
        draft_s: seconds of the draft's half of a round; None: there is no draft.
        wait_s: seconds of waiting after misses ``[R]``.
    """
    waits = np.zeros(len(made)) if wait_s is None else wait_s
    drafted_s = 0.0 if draft_s is None else draft_s + exchange_s
    round_s = np.maximum(forward_s + overhead_s, drafted_s) + waits
    began_s = np.cumsum(round_s) - round_s
    lookups = setting.batch * (setting.method == "ssd")
    kept = [
        RoundReport(
            began_s=float(began_s[i]),
            forward_s=float(forward_s[i]),
            wait_s=None if draft_s is None else max(0.0, draft_s - float(forward_s[i])),
            draft_s=draft_s,
            jit_s=float(waits[i]) or None,
            round_s=float(round_s[i]),
            rows=setting.batch,
            lookups=lookups,
            hits=int(hit[i].sum()),
            tokens=int(made[i]),
        )
        for i in range(min(len(made), KEPT_ROUNDS))
    ]
    return Simulated(
        setting=setting,
        tokens=int(made.sum()),
        seconds=float(round_s.sum()),
        count=len(made),
        lookups=lookups * len(made),
        hits=int(hit.sum()),
        verifier_busy_s=float(forward_s.sum()),
        draft_busy_s=len(made) * (draft_s or 0.0) + float(waits.sum()),
        rounds=kept,
    )
