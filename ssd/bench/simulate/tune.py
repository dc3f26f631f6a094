"""Tuning lookahead, budget and rows: the simulator names a few, real runs choose among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from ...config.load import Config, load_config
from ...request.sampling_params import SamplingParams
from ..measure.arms import MethodArm, Progress, interleave, merge
from ..measure.prompts import Prompt
from .calibrate import Size
from .plan import Space, ranked
from .profile import Profile
from .simulator import Setting, Simulator

if TYPE_CHECKING:
    from ...engine.llm import LLM

CLOSE = 0.01
"""Two settings that the simulator finds this near to each other are one: a larger tree must earn it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A setting and what it brought."""

    size: Size
    simulated: float
    measured: float | None = None

    @property
    def label(self) -> str:
        return f"K={self.size.lookahead} N={self.size.budget} W={self.rows}"

    @property
    def rows(self) -> int:
        """W."""
        return self.size.rows or self.size.lookahead + 1


def shortlist(profile: Profile, temperature: float, count: int, space: Space = Space()) -> list[Candidate]:  # noqa: B008
    """The best few by simulation; of those with the same tree, the smallest budget within ``CLOSE``."""
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
    config: Config,
    candidates: Sequence[Candidate],
    prompts: Sequence[Prompt],
    *,
    temperature: float = 0.0,
    max_tokens: int = 128,
    repeat: int = 2,
    launch: Callable[[Config], LLM] | None = None,
    progress: Progress | None = None,
) -> tuple[float, list[Candidate]]:
    """Run all candidates, their pipelines side by side and taking turns prompt by prompt. Returns the
    tokens per second of plain decoding (``none_fast``), and the candidates, fastest first.

    Raises:
        UsageError, WorkerError: as ``LLM``.
    """
    from ...engine.llm import LLM

    with ExitStack() as stack:
        arms = []
        for number, candidate in enumerate(candidates, start=1):
            if progress is not None:
                progress(0, 1, f"starting {number}/{len(candidates)}: {candidate.label}")
            llm = stack.enter_context((launch or LLM)(load_config(config, candidate.size.overrides)))
            if not arms:
                arms.append(MethodArm(llm, "none_fast"))
            arms.append(MethodArm(llm, "ssd", candidate.label))
        params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)
        found = interleave(arms, prompts, params, repeat=repeat, warmup_tokens=16, progress=progress)
    rates = {
        arm.name: merge(part for (name, _), parts in found.tallies.items() for part in parts if name == arm.name)
        for arm in arms
    }
    measured = [
        Candidate(size=one.size, simulated=one.simulated, measured=rates[one.label].tokens_per_second)
        for one in candidates
    ]
    plain = rates["none_fast"].tokens_per_second or 0.0
    return plain, sorted(measured, key=lambda candidate: -(candidate.measured or 0.0))


def tuned_yaml(config: Config, best: Candidate, comment: str) -> str:
    """The configuration with the best candidate's values, the figures above it."""
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
