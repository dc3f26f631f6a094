"""Measuring a profile: rounds of real pipelines at a few settings, and costs fitted to their times."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import TYPE_CHECKING

import numpy as np

from ...config.load import load_config
from ...config.sections import Config
from ...request.methods import MODELLED, Method
from ...request.sampling_params import SamplingParams
from ..measure.interleave import Launch
from ..measure.prompts import Prompt
from .profile import Costs, Line, Point, Profile

if TYPE_CHECKING:
    from ...engine.llm import LLM
    from ...pipeline.transport.messages import RoundReport

SKIPPED_ROUNDS = 2
"""Rounds at the beginning of a request that do not count: caches are cold."""
FEW = 8
"""A mean over fewer rounds of a kind is not used."""
ROWS = (5, 6, 8, 10, 12, 16)
"""Rows W of the combs that are replayed, besides the chains."""
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Sizes a pipeline is started with."""

    lookahead: int
    budget: int
    rows: int | None = None
    """W: verified rows per sequence, a comb; None: a chain."""
    batch: int = 1

    @property
    def overrides(self) -> list[str]:
        """The sizes as overrides of a configuration."""
        return [
            f"speculation.lookahead={self.lookahead}",
            "speculation.siblings=0",
            f"speculation.rows={'null' if self.rows is None else self.rows}",
            f"speculation.forecast.budget={self.budget}",
            f"engine.max_batch={self.batch}",
            "speculation.governor=false",
        ]


SIZES = (
    Size(lookahead=1, budget=4),
    Size(lookahead=2, budget=4),
    Size(lookahead=4, budget=24),
    Size(lookahead=8, budget=8),
    Size(lookahead=4, budget=8, rows=7),
    Size(lookahead=4, budget=8, rows=13),
    Size(lookahead=4, budget=8, batch=4),
)
"""Steps, branches, rows and sequences each vary while the others stay the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What :func:`measure` measures."""

    sizes: Sequence[Size] = SIZES
    temperatures: Sequence[float] = (0.0, 1.0)
    lookaheads: Sequence[int] = tuple(range(1, 9))
    rows: Sequence[int] = ROWS
    """Rows W of the combs to replay, besides the chains."""
    max_tokens: int = 96
    """Tokens generated for each prompt."""


def measure(
    launch: Launch,
    config: Config,
    prompts: Sequence[Prompt],
    options: Calibration = Calibration(),
    *,
    name: str,
    say: Say = lambda text: None,
) -> Profile:
    """Measures the rounds of a pipeline of every size, then replays the draft over the target's answers.

    Args:
        name: of the profile.
        say: called with what runs next.

    Raises:
        UsageError, WorkerError: as ``launch``.
    """
    from ...engine.front import make_plan
    from .replay import replay

    sizes, temperatures, max_tokens = options.sizes, options.temperatures, options.max_tokens

    points, padded = list[Point](), True
    texts: dict[float, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for number, size in enumerate(sizes, start=1):
        say(f"start {number}/{len(sizes)}: {_describe(size)}")
        with launch(load_config(config, size.overrides)) as llm:
            for temperature in temperatures:
                if temperature not in texts:
                    params = _params("none", temperature, max_tokens + max(options.lookaheads) + 1)
                    outputs = [llm.generate([prompt.text], params)[0] for prompt in prompts]
                    texts[temperature] = [(output.prompt_token_ids, output.token_ids) for output in outputs]
                say(f"start {number}/{len(sizes)}: {_describe(size)}, temperature {temperature:g}")
                found = watch(llm, prompts, size, temperature, max_tokens)
                points += [one.model_copy(update={"start": number}) for one in found]
            padded = llm.info()["verifier"]["padded"]
    content = {}
    plan = make_plan(config)[1]
    for temperature in temperatures:
        say(f"replaying the draft over the answers, temperature {temperature:g}")
        params = _params("ssd", temperature, max_tokens)
        content[f"{temperature:g}"] = replay(
            plan, texts[temperature], params, lookaheads=options.lookaheads, rows=options.rows
        )
    return Profile(
        name=name,
        machine=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        costs={f"{t:g}": fit(steadied(points), t) for t in temperatures},
        padded=padded,
        content=content,
        points=points,
    )


def watch(llm: LLM, prompts: Sequence[Prompt], size: Size, temperature: float, max_tokens: int) -> list[Point]:
    """Runs the prompts with every method in turns, ``size.batch`` at a time, and returns a point for each method.

    Where prompts are fewer than the batch, they repeat. Methods take turns so that a machine that slows down slows
    all of them.
    """
    rounds: dict[Method, list[RoundReport]] = {method: [] for method in MODELLED}
    for method in MODELLED:
        llm.generate([prompts[0].text] * size.batch, _params(method, temperature, 8))
    for start in range(0, len(prompts), size.batch):
        group = [prompts[(start + i) % len(prompts)].text for i in range(size.batch)]
        for method, of_method in rounds.items():
            with llm.watch() as seen:
                llm.generate(group, _params(method, temperature, max_tokens))
            of_method += seen[SKIPPED_ROUNDS:] or seen
    return [point(found, size, method, temperature) for method, found in rounds.items()]


def point(rounds: Sequence[RoundReport], size: Size, method: Method, temperature: float) -> Point:
    """Returns the means over the rounds of one method."""
    after_wait = [now.forward_s for before, now in pairwise(rounds) if before.jit_s]
    at_once = [now.forward_s for before, now in pairwise(rounds) if not before.jit_s] or after_wait
    halves = [(one.forward_s, one.draft_s or 0.0, one.round_s - (one.jit_s or 0.0)) for one in rounds]
    alone = [round_s - forward_s for forward_s, draft_s, round_s in halves if draft_s <= forward_s]
    overhead_s = max(0.0, fmean(alone)) if len(alone) >= FEW else None
    spare_s = overhead_s or 0.0
    late = [round_s - draft_s for forward_s, draft_s, round_s in halves if draft_s > forward_s + spare_s]
    return Point(
        method=method,
        temperature=temperature,
        lookahead=size.lookahead,
        budget=size.budget,
        batch=size.batch,
        rows=size.batch * (1 if method in ("none", "none_fast") else size.rows or size.lookahead + 1),
        rounds=len(rounds),
        forward_s=fmean(at_once),
        draft_s=_mean([one.draft_s for one in rounds]),
        jit_s=_mean([one.jit_s for one in rounds]),
        overhead_s=overhead_s,
        exchange_s=fmean(late) if len(late) >= FEW else None,
        after_wait_s=fmean(after_wait) - fmean(at_once) if after_wait and method == "ssd" else None,
    )


def steadied(points: Sequence[Point]) -> list[Point]:
    """Returns the points corrected for changes of the machine's speed.

    The speed of a shared host changes within minutes, by more than the sizes change the times. So the times of each
    start are divided by its time of plain decoding, relative to the median over all starts. Starts with a larger
    batch than the smallest have nothing to be compared with and stay as they are.
    """
    smallest = min(point.batch for point in points)
    plain = {
        (point.start, point.temperature): point.forward_s
        for point in points
        if point.method == "none_fast" and point.batch == smallest
    }
    usual = median(plain.values())
    found = []
    for point in points:
        ratio = usual / plain.get((point.start, point.temperature), usual)
        found.append(point.model_copy(update={name: s * ratio for name, s in point if name.endswith("_s") and s}))
    return found


def fit(points: Sequence[Point], temperature: float) -> Costs:
    """Fits the costs at one temperature to the points, by least squares with coefficients >= 0.

    Overheads and waits are those of the smallest batch.
    """
    smallest = min(point.batch for point in points)
    of_all = {method: [p for p in points if p.method == method and p.temperature == temperature] for method in MODELLED}
    single = {method: [p for p in found if p.batch == smallest] for method, found in of_all.items()}
    trees = [
        ([1.0, p.rows, p.lookahead, p.lookahead * p.budget * p.batch], p.draft_s) for p in of_all["ssd"] if p.draft_s
    ]
    base, per_node, per_step, per_row = _least_squares(trees, 4)
    jit, sd = _waits(single["ssd"]), _waits(single["sd"])
    plain_s = _mean([p.overhead_s for p in [*single["none_fast"], *single["none"]]]) or 0.0
    rest = [
        ([float(p.method == "sd"), float(p.method == "ssd"), p.lookahead], p.overhead_s)
        for p in [*single["sd"], *single["ssd"]]
        if p.overhead_s
    ]
    sd_s, ssd_s, per_position = _least_squares(rest, 3)
    if all(p.overhead_s is None for p in single["ssd"]):
        ssd_s = sd_s
    target, sequence = _forwards(points, smallest)
    return Costs(
        target=target,
        sequence=sequence,
        tree=Line(base=base, per_node=per_node, per_step=per_step, per_row=per_row),
        jit=jit or sd or Line(),
        sd=sd,
        glue=_mean([p.draft_s for p in single["sd"]]) or 0.0,
        overhead={"none": plain_s, "sd": sd_s, "ssd": ssd_s},
        per_position=per_position,
        exchange=_mean([p.exchange_s for p in single["ssd"]]) or 0.0,
        after_wait=max(0.0, _mean([p.after_wait_s for p in single["ssd"]]) or 0.0),
    )


def _forwards(points: Sequence[Point], smallest: int) -> tuple[dict[int, float], float]:
    """Returns seconds of a forward by its rows, and the seconds that each further sequence adds in plain decoding.

    A forward that follows a wait for the draft is slower. Such points, and those of larger batches, are used only
    for more rows than the other points have.
    """
    prompt = [p for p in points if p.method == "none_fast" or (p.method == "ssd" and p.overhead_s is not None)]
    target = _by_rows([p for p in prompt if p.batch == smallest])
    line = Costs(target=target, tree=Line(), jit=Line(), overhead={})
    added = [
        (p.forward_s - line.forward(p.rows)) / (p.batch - smallest)
        for p in points
        if p.method == "none_fast" and p.batch > smallest
    ]
    sequence = max(0.0, _mean(added) or 0.0)
    beyond = [p for p in points if p.method == "ssd" and p.rows > max(target)]
    lone = [p.model_copy(update={"forward_s": p.forward_s - (p.batch - smallest) * sequence}) for p in beyond]
    return target | _by_rows(lone), sequence


def _by_rows(points: Sequence[Point]) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for point in sorted(points, key=lambda one: one.rows):
        found.setdefault(point.rows, []).append(point.forward_s)
    return {rows: fmean(seconds) for rows, seconds in found.items()}


def _waits(points: Sequence[Point]) -> Line | None:
    """Returns the wait for K draft tokens after a miss, as a line over K."""
    waits = [([1.0, p.lookahead], p.jit_s) for p in points if p.jit_s]
    base, per_step = _least_squares(waits, 2)
    return Line(base=base, per_step=per_step) if waits else None


def _least_squares(samples: list[tuple[list[float], float]], unknowns: int) -> list[float]:
    """Returns coefficients >= 0: the most negative one is set to 0 until none is left."""
    used = list(range(unknowns))
    found = [0.0] * unknowns
    while used and samples:
        left = np.array([[row[i] for i in used] for row, _ in samples])
        # Errors are relative, so that a small tree counts as much as a large one.
        right = np.array([value for _, value in samples])
        solved = np.linalg.lstsq(left / right[:, None], np.ones(len(right)), rcond=None)[0]
        if solved.min() >= 0:
            for index, value in zip(used, solved, strict=True):
                found[index] = float(value)
            break
        used.pop(int(solved.argmin()))
    return found


def _params(method: Method | None, temperature: float, tokens: int) -> SamplingParams:
    return SamplingParams(method=method, temperature=temperature, max_tokens=tokens, ignore_eos=True)


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


def _describe(size: Size) -> str:
    return (
        f"lookahead {size.lookahead}, budget {size.budget}, rows {size.rows or size.lookahead + 1}, batch {size.batch}"
    )
