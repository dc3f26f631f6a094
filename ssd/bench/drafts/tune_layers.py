"""``ssd tune layers``: the skip set of method ``self`` that is fastest on the user's prompts.

Published patterns are estimated first, then sublayers are put in and out one at a time as long as the estimate
rises; real runs, in turns with plain decoding, decide among the best.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from ...config.load import load_config
from ...config.sections import Config
from ...models.skipping import SkipSet
from ..measure.arms import Progress
from ..measure.compare import compare
from ..measure.prompts import Prompt
from .skip_estimate import Estimate

if TYPE_CHECKING:
    from ...engine.llm import LLM

WORTH = 1.002
"""A change must raise the estimate by this factor to be kept."""
NEAR = 0.25
"""Candidates for real runs differ in at least this share of their sublayers, while there are such."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A skip set, what was expected and what it brought."""

    estimate: Estimate
    speedup: float | None = None
    """Tokens per second over ``none_fast``, measured in turns."""
    acceptance: float | None = None
    cost: float | None = None
    """Seconds of a step over those of a verification, measured."""
    identical: bool = True

    @property
    def overrides(self) -> list[str]:
        """The configuration of this candidate, beside the user's own."""
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
    """Sets from the literature, where the search begins."""
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
    """The best estimate found by the deadline: from the best pattern uphill, toggling a sublayer or trading one
    for another, in an order drawn once."""
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
            progress(f"best of the estimates {best.speedup:.2f}×")
            if found.speedup > best.speedup * WORTH:
                best, better = found, True
                break
    return best


def _neighbours(skips: SkipSet) -> Iterator[SkipSet]:
    """One sublayer more or less; one for another of its kind; a whole layer more or less."""
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
    """The best of the estimates that are not all but the same set."""
    chosen: list[Estimate] = []
    for one in seen:
        alike = any(_distance(one.skips, other.skips) < NEAR * max(one.skips.count, 1) for other in chosen)
        if not alike and len(chosen) < count:
            chosen.append(one)
    rest = [one for one in seen if one not in chosen]
    return [Candidate(estimate=one) for one in [*chosen, *rest[: count - len(chosen)]]]


def measure(
    config: Config,
    candidate: Candidate,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    repeat: int = 1,
    launch: Callable[[Config], LLM] | None = None,
    progress: Progress | None = None,
) -> Candidate:
    """Run a candidate in turns with plain decoding (``none_fast`` and ``none``), in one pipeline.

    Raises:
        UsageError, WorkerError: as ``LLM``.
    """
    from ...engine.llm import LLM

    settings = load_config(config, [*candidate.overrides, "speculation.governor=false"])
    with (launch or LLM)(settings) as llm:
        found = compare(
            llm, prompts, methods=("none", "self"), max_tokens=max_tokens, repeat=repeat, progress=progress
        ).to_json()["methods"]["self"]
    drafts, forward = found["draft_ms"], found["forward_ms"]
    return Candidate(
        estimate=candidate.estimate,
        speedup=found["speedup"],
        acceptance=found["acceptance_rate"],
        # A chain that ends early has fewer steps: the median round's are those of most rounds.
        cost=drafts / forward / candidate.estimate.lookahead if drafts and forward else None,
        identical=found["identical"],
    )


def layers_yaml(config: Config, best: Candidate, comment: str) -> str:
    """The configuration with the candidate's values, the figures above it."""
    tree: dict[str, Any] = load_config(config, best.overrides).model_dump(exclude_none=True)
    return "".join(f"# {line}\n" for line in comment.splitlines()) + yaml.safe_dump(tree, sort_keys=False)


def _distance(one: SkipSet, other: SkipSet) -> int:
    return len(one.attention ^ other.attention) + len(one.mlp ^ other.mlp)


def _speedup(estimate: Estimate) -> float:
    return estimate.speedup
