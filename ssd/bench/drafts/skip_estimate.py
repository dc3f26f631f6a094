"""Estimates the speedup of a skip set of method ``self`` with one forward, without starting a pipeline.

The target decodes the prompts once, greedily, and leaves its keys in the slots. The model with skipped sublayers then
runs over all positions of the answers at once; every row attends the target's own keys before it, as in a draft's
first step. While it agrees with the next tokens of the answer, a chain that begins there would be accepted. Rounds
are replayed over these agreements for every lookahead and confidence. Times are measured on this machine: a step
takes the time of the whole forward minus that of the skipped sublayers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from ...config.machine import usable_cores
from ...models.rows import RowPlan
from ...models.runner import ForwardRunner, RunnerOptions
from ...models.skipping import SkipSet, skipping
from ...pipeline.runtime.cores import set_threads
from ...pipeline.runtime.plan import Plan
from ...pipeline.runtime.runners import target_runner

LOOKAHEADS = (1, 2, 3, 4, 5, 6, 7, 8)
CONFIDENCES = (0.0, 0.3, 0.5, 0.7, 0.85, 0.95)
TIMED = 15
MOST = 12
"""Largest number of prompts: the logits of all answers are in memory at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Seconds of forwards."""

    plain: float
    """The whole target, one row per sequence."""
    attention: float
    """The attention of one layer."""
    mlp: float
    row: float
    """Added by each further row per sequence."""

    def step(self, skips: SkipSet) -> float:
        """Returns the seconds of a draft step."""
        return max(self.plain - len(skips.attention) * self.attention - len(skips.mlp) * self.mlp, 0.0)

    def verification(self, lookahead: int) -> float:
        """Returns the seconds of a verification."""
        return self.plain + lookahead * self.row


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The estimate of a skip set at its best lookahead and confidence."""

    skips: SkipSet
    lookahead: int
    confidence: float
    cost: float
    """c: time of a step relative to a plain forward."""
    acceptance: float
    """α: accepted tokens over drafted tokens."""
    speedup: float
    """Tokens per second relative to plain decoding with one row."""


def replayed(agrees: Sequence[bool], sure: Sequence[float], lookahead: int, confidence: float) -> tuple[int, int, int]:
    """Replays the rounds of one answer; returns the numbers of rounds, drafted and accepted tokens.

    Args:
        agrees: for each position, whether the draft's token is the answer's.
        sure: for each position, the draft's probability of its token.
    """
    rounds = drafted = accepted = position = 0
    while position < len(agrees):
        rounds += 1
        right = True
        for at in range(position, min(position + lookahead, len(agrees))):
            drafted += 1
            right = right and agrees[at]
            if right:
                accepted += 1
                position += 1
            if sure[at] < confidence:
                break
        position += 1  # the bonus token
    return rounds, drafted, accepted


class Estimator:
    """Estimates skip sets on prompts.

    Args:
        prompts: token ids.
        tokens: length of the answers.

    Raises:
        UsageError: the target cannot be loaded, or its sublayers are not known.
    """

    def __init__(self, plan: Plan, prompts: Sequence[Sequence[int]], *, tokens: int):
        set_threads(usable_cores(plan.config.target.cores), 1)
        single = target_runner(plan)
        self.model, self.layers = single.model, single.cache.layers
        self.costs = measured_costs(single)
        self._tokens = tokens
        options = RunnerOptions(
            batch=len(prompts),
            capacity=max(map(len, prompts)) + tokens + 1,
            scratch_slots=tokens,
            prefill_chunk=single.chunk,
            vocabulary=plan.vocabulary,
            attention=single.attention,
        )
        self._runner = ForwardRunner(single.model, options)
        # Every row attends the verified keys before it; its own key is written where no row attends.
        steps = tuple(range(tokens))
        self._rows = RowPlan(name="agreement", offsets=steps, limits=steps, in_place=0)
        self._lengths = torch.tensor([len(prompt) - 1 for prompt in prompts], device=single.device)
        self._answers = self._decode(prompts)
        self._known: dict[SkipSet, Estimate] = {}

    def _decode(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Returns the last prompt token and the target's greedy answer of every prompt, ``[P, tokens + 1]``."""
        for slot, prompt in enumerate(prompts):
            self._runner.prefill(slot, prompt[:-1])
        one, longest = RowPlan.sequential("one", 1), max(map(len, prompts))
        answers = [torch.tensor([[prompt[-1]] for prompt in prompts], device=self._lengths.device)]
        for step in range(self._tokens):
            logits = self._runner.forward(one, answers[-1], self._lengths + step, longest=longest + step)
            answers.append(logits[:, -1:].argmax(-1))
        return torch.cat(answers, dim=1)

    @property
    def seen(self) -> list[Estimate]:
        """All estimates so far, best first."""
        return sorted(self._known.values(), key=lambda one: -one.speedup)

    def of(self, skips: SkipSet) -> Estimate:
        """Returns the estimate of a skip set; the first call for a set runs one forward."""
        known = self._known.get(skips)
        if known is None:
            known = self._known[skips] = self._estimate(skips)
        return known

    def agreement(self, skips: SkipSet) -> tuple[list[list[bool]], list[list[float]]]:
        """Runs the model without the skipped sublayers over the answers.

        Returns:
            For each prompt and position of the answer: whether the most probable token is the answer's, and its
            probability.
        """
        runner = self._runner.over(skipping(self.model, skips))
        longest = int(self._lengths.max()) + self._tokens
        logits = runner.forward(self._rows, self._answers[:, :-1], self._lengths, longest=longest)
        chosen = logits.argmax(-1)
        sure = logits.softmax(-1).gather(-1, chosen[..., None]).squeeze(-1).tolist()
        return (chosen == self._answers[:, 1:]).tolist(), sure

    def _estimate(self, skips: SkipSet) -> Estimate:
        agrees, sure = self.agreement(skips)
        step = self.costs.step(skips)
        best: Estimate | None = None
        for lookahead in LOOKAHEADS:
            for confidence in CONFIDENCES:
                runs = [replayed(a, s, lookahead, confidence) for a, s in zip(agrees, sure, strict=True)]
                rounds, drafted, accepted = (sum(counts) for counts in zip(*runs, strict=True))
                seconds = rounds * self.costs.verification(lookahead) + drafted * step
                speedup = (rounds + accepted) * self.costs.plain / seconds
                if best is None or speedup > best.speedup:
                    best = Estimate(
                        skips=skips,
                        lookahead=lookahead,
                        confidence=confidence,
                        cost=step / self.costs.plain,
                        acceptance=accepted / drafted,
                        speedup=speedup,
                    )
        assert best is not None
        return best


def measured_costs(runner: ForwardRunner, timed: int = TIMED) -> Costs:
    """Measures the costs from four forwards in turns, compiled if the runner compiles.

    They are the whole target with one row and with many, and the target without any attention and without any MLP.
    """
    layers, everything = runner.cache.layers, range(runner.cache.layers)
    rows = 1 + max(LOOKAHEADS)
    one = RowPlan.sequential("one", 1)
    arms = [
        (runner, one),
        (runner, RowPlan.sequential("many", rows)),
        (runner.over(skipping(runner.model, SkipSet.of(everything, (), layers))), one),
        (runner.over(skipping(runner.model, SkipSet.of((), everything, layers))), one),
    ]
    spent: list[list[float]] = [[] for _ in arms]
    longest = runner.contexts[0] // 2
    lengths = torch.full((runner.batch,), longest, device=runner.device)
    for turn in range(timed + 2):
        for seconds, (who, plan) in zip(spent, arms, strict=True):
            tokens = torch.zeros(runner.batch, plan.rows, dtype=torch.int64, device=runner.device)
            began = time.perf_counter()
            who.forward(plan, tokens, lengths, longest=longest).sum().item()  # waits for the device
            if turn >= 2:  # the first turns compile and warm up
                seconds.append(time.perf_counter() - began)
    plain, many, no_attention, no_mlp = map(median, spent)
    return Costs(
        plain=plain,
        attention=max(plain - no_attention, 0.0) / layers,
        mlp=max(plain - no_mlp, 0.0) / layers,
        row=max(many - plain, 0.0) / (rows - 1),
    )
