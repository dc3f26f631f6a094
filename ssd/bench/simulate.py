"""Rounds without models: a discrete-event simulation of draft and verifier from a profile.

The verifier's lane and the draft's lane meet at the exchange, as in ``pipeline.loops``: a round
ends when both are there, and a batch in which a row missed waits for ``jit`` (fallback ``jit``) or
goes on with the bonus token alone in that row (``none``). Closed forms it must reproduce
(``tests/unit/test_simulate.py``; Saguaro, arXiv 2603.03251, Theorem 7, with T in units of one
verification): ``sd`` brings E/(1 + T_SD), ``ssd`` [p E_hit + (1-p) E_miss] / [p max(1, T_p) +
(1-p)(1 + T_b)], a batch stalls with chance 1 - p^b.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..errors import RequestError
from ..pipeline.messages import RoundReport
from .profile import NEVER, Costs, Independent, Profile, Replay

KEPT_ROUNDS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What to run, and on what."""

    method: Literal["none", "none_fast", "sd", "ssd"] = "ssd"
    lookahead: int = 4
    budget: int = 12
    siblings: int = 0
    batch: int = 1
    fallback: Literal["jit", "none"] = "jit"
    temperature: float = 0.0
    target_devices: int = 1
    """The target's forward is tensor-parallel over these."""
    draft_devices: int = 1
    """The forecast's branches are dealt out to these."""

    @property
    def rows(self) -> int:
        """W: rows a sequence verifies."""
        return 1 if self.method == "none_fast" else 1 + self.lookahead * (1 + self.siblings)

    @property
    def devices(self) -> int:
        return self.target_devices + (self.draft_devices if self.method in ("sd", "ssd") else 0)


@dataclass(kw_only=True, slots=True)
class Simulated:
    """What a simulation gave."""

    setting: Setting
    tokens: int = 0
    seconds: float = 0.0
    count: int = 0
    """Rounds."""
    lookups: int = 0
    hits: int = 0
    verifier_busy_s: float = 0.0
    draft_busy_s: float = 0.0
    rounds: list[RoundReport] = field(default_factory=list)
    """The first of them, for a timeline."""

    def add(
        self,
        *,
        forward_s: float,
        round_s: float,
        tokens: int,
        draft_s: float | None = None,
        wait_s: float = 0.0,
        lookups: int = 0,
        hits: int = 0,
    ) -> None:
        """One round. ``draft_s``: of a draft that took part; ``wait_s``: after misses."""
        if len(self.rounds) < KEPT_ROUNDS:
            report = RoundReport(
                began_s=self.seconds,
                forward_s=forward_s,
                wait_s=None if draft_s is None else max(0.0, draft_s - forward_s),
                draft_s=draft_s,
                jit_s=wait_s or None,
                round_s=round_s,
                rows=self.setting.batch,
                lookups=lookups,
                hits=hits,
                tokens=tokens,
            )
            self.rounds.append(report)
        self.seconds += round_s
        self.tokens += tokens
        self.count += 1
        self.lookups += lookups
        self.hits += hits
        self.verifier_busy_s += forward_s
        self.draft_busy_s += (draft_s or 0.0) + wait_s

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
    """Run until so many tokens are there (over all sequences).

    Raises:
        RequestError: the profile does not know the tree; a setting that cannot be.
    """
    if min(setting.target_devices, setting.draft_devices, setting.batch, setting.lookahead) < 1:
        raise RequestError("devices, batch and lookahead must be at least 1")
    costs, content = profile.at(setting.temperature)
    if setting.method in ("none", "none_fast"):
        return _plainly(costs, setting, tokens)
    return _speculating(costs, content, setting, tokens)


def _plainly(costs: Costs, setting: Setting, tokens: int) -> Simulated:
    forward_s = costs.forward(setting.batch * setting.rows, setting.target_devices)
    round_s = forward_s + costs.overhead["none"]
    done = Simulated(setting=setting)
    while done.tokens < tokens:
        done.add(forward_s=forward_s, round_s=round_s, tokens=setting.batch)
    return done


def _speculating(costs: Costs, content: Replay | Independent, setting: Setting, tokens: int) -> Simulated:
    ssd, depth, batch = setting.method == "ssd", setting.lookahead, setting.batch
    bare_s = costs.forward(batch * setting.rows, setting.target_devices)
    share = -(-setting.budget // setting.draft_devices)
    draft_s = costs.tree.seconds(depth, batch * share) if ssd else costs.glue
    overhead_s, jit_s = costs.overhead["ssd" if ssd else "sd"], costs.jit.seconds(depth)
    walks = [content.walk(depth, setting.siblings, row) for row in range(batch)]
    bare = [False] * batch  # rows whose round has no candidates
    done, waited = Simulated(setting=setting), False
    while done.tokens < tokens:
        forward_s = bare_s + (costs.after_wait if waited else 0.0)
        results = [walk(plain) for walk, plain in zip(walks, bare, strict=True)]
        hit = [ssd and NEVER < needed <= setting.budget for _, needed in results]
        bare = [ssd and setting.fallback == "none" and not found for found in hit]
        waited = not all(hit) and not any(bare)
        wait_s = jit_s if waited else 0.0
        done.add(
            forward_s=forward_s,
            round_s=max(forward_s, draft_s) + overhead_s + wait_s,
            tokens=sum(accepted + 1 for accepted, _ in results),
            draft_s=draft_s,
            wait_s=wait_s,
            lookups=batch * ssd,
            hits=sum(hit),
        )
    return done
