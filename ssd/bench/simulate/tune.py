"""Tuning lookahead, budget and rows: the simulator proposes a few settings, real runs choose among them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import yaml

from ...config.load import load_config
from ...config.sections import Config
from ..measure.interleave import Launch, MethodArm, Progress, Runs, interleave
from ..measure.prompts import Prompt
from .calibrate import Size
from .plan import Space, ranked
from .profile import Profile
from .simulator import Setting, Simulator

CLOSE = 0.01
"""Simulated rates that differ by less than this share are equal: the smaller budget is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A setting with its simulated and its measured rate, in tokens per second."""

    size: Size
    simulated: float
    measured: float | None = None

    @property
    def label(self) -> str:
        return f"K={self.size.lookahead} N={self.size.budget} W={self.rows}"

    @property
    def rows(self) -> int:
        """W: verified rows per sequence."""
        return self.size.rows or self.size.lookahead + 1


def shortlist(profile: Profile, temperature: float, count: int, space: Space = Space()) -> list[Candidate]:  # noqa: B008
    """Returns the best settings by simulation, one for each tree: with its smallest budget within ``CLOSE``."""
    best: dict[tuple[int, int], Candidate] = {}
    for one in ranked(Simulator(profile), Setting(temperature=temperature), space):
        at, rate = one.setting, one.tokens_per_second
        known = best.get((at.lookahead, at.tree_rows))
        smaller = known is not None and at.budget < known.size.budget and rate > known.simulated * (1 - CLOSE)
        if known is None or smaller:
            size = Size(lookahead=at.lookahead, budget=at.budget, rows=at.tree_rows)
            best[at.lookahead, at.tree_rows] = Candidate(size=size, simulated=rate)
    return sorted(best.values(), key=lambda candidate: -candidate.simulated)[:count]


def measure_candidates(
    launch: Launch,
    config: Config,
    candidates: Sequence[Candidate],
    prompts: Sequence[Prompt],
    runs: Runs,
    *,
    progress: Progress | None = None,
) -> tuple[float, list[Candidate]]:
    """Runs all candidates in turns, each in a pipeline of its own.

    Returns:
        Tokens per second of plain decoding (``none_fast``), and the candidates, fastest first.

    Raises:
        UsageError, WorkerError: as ``launch``.
    """
    with ExitStack() as stack:
        arms = []
        for number, candidate in enumerate(candidates, start=1):
            if progress is not None:
                progress(0, 1, f"starting {number}/{len(candidates)}: {candidate.label}")
            llm = stack.enter_context(launch(load_config(config, candidate.size.overrides)))
            if not arms:
                arms.append(MethodArm(llm, "none_fast"))
            arms.append(MethodArm(llm, "ssd", candidate.label))
        found = interleave(arms, prompts, runs, progress=progress)
    measured = [replace(one, measured=found.total(one.label).tokens_per_second) for one in candidates]
    plain = found.total("none_fast").tokens_per_second or 0.0
    return plain, sorted(measured, key=lambda candidate: -(candidate.measured or 0.0))


def tuned_yaml(config: Config, best: Candidate, comment: str) -> str:
    """Returns the configuration with the candidate's values as YAML, with ``comment`` above it."""
    tree: dict[str, Any] = load_config(
        config,
        [
            override
            for override in best.size.overrides
            if override.startswith("speculation.") and "governor" not in override
        ],
    ).model_dump(exclude_none=True)
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + yaml.safe_dump(tree, sort_keys=False)
