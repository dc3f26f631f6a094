"""``ssd tune layers``: searches the skip set of method ``self`` that is fastest on the user's prompts.

The search estimates published patterns first, then skips or restores one sublayer at a time as long as the estimate
rises. Real runs, in turns with plain decoding, decide among the best.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ...config.load import load_config
from ...config.sections import Config
from ...models.skipping import SkipSet
from ..measure.compare import compare
from ..measure.interleave import Launch, Progress, Runs
from ..measure.prompts import Prompt
from .skip_estimate import Estimate

WORTH = 1.002
"""A change must raise the estimate by this factor to be kept."""
NEAR = 0.25
"""Candidates for real runs differ in at least this share of their skipped sublayers, where that is possible."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A skip set with its estimate and its measured figures."""

    estimate: Estimate
    speedup: float | None = None
    """Tokens per second relative to ``none_fast``, measured in turns."""
    acceptance: float | None = None
    cost: float | None = None
    """Seconds of a draft step relative to a verification, measured."""
    identical: bool = True

    @property
    def overrides(self) -> list[str]:
        """The candidate as overrides of a configuration."""
        found = self.estimate
        return [
            "draft=null",
            "speculation.method=self",
            f"speculation.lookahead={found.lookahead}",
            "speculation.siblings=0",
            "speculation.rows=null",
            f"speculation.self.skip_attention={sorted(found.skips.attention)}",
            f"speculation.self.skip_mlp={sorted(found.skips.mlp)}",
            f"speculation.self.confidence={found.confidence:g}",
        ]


def patterns(layers: int) -> Iterator[SkipSet]:
    """Yields skip sets from the literature; the search begins with the best of them."""
    middle = range(1, layers - 1)
    for step in (2, 3):  # SWIFT's uniform start
        yield SkipSet.of(middle[::step], middle[::step], layers)
    # Draft & Verify: attention more than MLP, middle and late layers (24 and 10 of 40 in LLaMA-2-13B).
    late = range(layers // 3, layers - 1)
    yield SkipSet.of(late, late[::2], layers)
    yield SkipSet.of(late, (), layers)
    yield SkipSet.of(middle, (), layers)
    for share in (0.25, 0.5, 0.75):  # LayerSkip: leave early
        exit_ = max(1, round(layers * share))
        yield SkipSet.of(range(exit_, layers), range(exit_, layers), layers)
    third = max(1, layers // 3)  # one block in the middle
    block = range((layers - third) // 2, (layers + third) // 2)
    yield SkipSet.of(block, block, layers)


def search(
    of: Callable[[SkipSet], Estimate],
    layers: int,
    *,
    deadline_s: float,
    progress: Callable[[str], None] = lambda label: None,
    clock: Callable[[], float] = time.monotonic,
) -> Estimate:
    """Returns the best estimate found by the deadline.

    A hill climb from the best published pattern: each step skips or restores a sublayer, or exchanges two. The order
    in which steps are tried is random with a fixed seed.

    Args:
        of: estimates a skip set.
        deadline_s: on ``clock``.
        progress: called with a description of the best estimate so far.
    """
    best = max((of(skips) for skips in dict.fromkeys(patterns(layers))), key=_speedup)
    order = random.Random(0)
    better = True
    while better and clock() < deadline_s:
        better = False
        neighbours = list(_neighbours(best.skips))
        order.shuffle(neighbours)
        for skips in neighbours:
            if clock() >= deadline_s:
                break
            found = of(skips)
            progress(f"best estimate {best.speedup:.2f}×")
            if found.speedup > best.speedup * WORTH:
                best, better = found, True
                break
    return best


def _neighbours(skips: SkipSet) -> Iterator[SkipSet]:
    """Yields the sets that differ in one sublayer or one layer, or exchange one sublayer for another of its kind."""
    layers = range(skips.layers)
    for layer in layers:
        yield SkipSet(skips.attention ^ {layer}, skips.mlp, skips.layers)
        yield SkipSet(skips.attention, skips.mlp ^ {layer}, skips.layers)
        both = layer in skips.attention and layer in skips.mlp
        change = frozenset({layer})
        attention, mlp = (
            (skips.attention - change, skips.mlp - change) if both else (skips.attention | change, skips.mlp | change)
        )
        yield SkipSet(attention, mlp, skips.layers)
        for other in layers:
            if layer in skips.attention and other not in skips.attention:
                yield SkipSet(skips.attention ^ {layer, other}, skips.mlp, skips.layers)
            if layer in skips.mlp and other not in skips.mlp:
                yield SkipSet(skips.attention, skips.mlp ^ {layer, other}, skips.layers)


def shortlist(seen: Sequence[Estimate], count: int) -> list[Candidate]:
    """Returns the best estimates that differ enough from each other, then the best of the others.

    Args:
        seen: all estimates, best first.
    """
    chosen: list[Estimate] = []
    for one in seen:
        alike = any(_distance(one.skips, other.skips) < NEAR * max(one.skips.count, 1) for other in chosen)
        if not alike and len(chosen) < count:
            chosen.append(one)
    rest = [one for one in seen if one not in chosen]
    return [Candidate(estimate=one) for one in [*chosen, *rest[: count - len(chosen)]]]


def measure(
    launch: Launch,
    config: Config,
    candidate: Candidate,
    prompts: Sequence[Prompt],
    runs: Runs,
    *,
    progress: Progress | None = None,
) -> Candidate:
    """Runs a candidate in turns with plain decoding (``none_fast`` and ``none``), in one pipeline.

    Raises:
        UsageError, WorkerError: as ``launch``.
    """
    settings = load_config(config, [*candidate.overrides, "speculation.governor=false"])
    with launch(settings) as llm:
        comparison = compare(llm, prompts, runs, methods=("none", "self"), progress=progress)
    found = comparison.to_json()["methods"]["self"]
    drafts, forward = found["draft_ms"], found["forward_ms"]
    return Candidate(
        estimate=candidate.estimate,
        speedup=found["speedup"],
        acceptance=found["acceptance_rate"],
        # Chains that end early have fewer steps; the median is over rounds, most of which have all steps.
        cost=drafts / forward / candidate.estimate.lookahead if drafts and forward else None,
        identical=found["identical"],
    )


def layers_yaml(config: Config, best: Candidate, comment: str) -> str:
    """Returns the configuration with the candidate's values as YAML, with ``comment`` above it."""
    tree: dict[str, Any] = load_config(config, best.overrides).model_dump(exclude_none=True)
    return "".join(f"# {line}\n" for line in comment.splitlines()) + yaml.safe_dump(tree, sort_keys=False)


def _distance(one: SkipSet, other: SkipSet) -> int:
    return len(one.attention ^ other.attention) + len(one.mlp ^ other.mlp)


def _speedup(estimate: Estimate) -> float:
    return estimate.speedup
