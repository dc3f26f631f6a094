"""The draft worker: what it knows of every sequence, and what it prepares while the verifier
checks. Decisions only; ``loops`` moves the frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decoding.forecast import Forecast, bonus_guesses
from ..decoding.processors import TreePaths
from ..decoding.tree import ABSENT, TreeShape
from ..models.rows import RowPlan
from ..models.runner import ForwardRunner
from .chooser import Chooser
from .frames import OutcomeFrame, RowState, SpeculationSet
from .lookup import lookup
from .messages import Admit


@dataclass(slots=True)
class _Row:
    tokens: list[int]
    """Committed, the root excluded."""
    cached: int
    """How many of them have keys and values here."""
    forecasts: bool
    """Whether outcomes are prepared for it (``ssd``), or only misses served (``sd``)."""


class DraftWorker:
    """Prepares a speculation set per round for the trees under verification.

    Args:
        runner: of the draft model, over the same slots as the verifier's.
        shape: the candidate tree. forecast: which outcomes get a branch.
    """

    def __init__(self, runner: ForwardRunner, *, shape: TreeShape, forecast: Forecast):
        self.runner, self.shape, self.forecast = runner, shape, forecast
        batch, device = runner.batch, runner.device
        self.rows: list[_Row | None] = [None] * batch
        self.trees = torch.full((batch, shape.nodes), ABSENT)
        self.chooser = Chooser(batch, runner.vocabulary, device, horizon=2 * shape.depth + 1, compile=runner.compile)
        self._parents, self._depths = shape.parent_index(device), shape.depth_index(device)
        self._nodes = torch.tensor(forecast.nodes, device=device)
        self._ranks = torch.tensor(forecast.ranks, device=device)
        self._paths = TreePaths(shape, device)
        self._glue = RowPlan.tree("glue", shape)
        self._step = RowPlan.sequential("jit", 1)
        self._branches = branch_plans(shape, forecast)
        self._width = 1 + self._siblings
        self._in_glue: set[int] = set()
        self._whole: Callable[..., tuple[Tensor, Tensor]] | None = None
        self._silence = torch.zeros(batch, 2 * shape.depth + 1, runner.vocabulary, device=device)

    @property
    def _siblings(self) -> int:
        return (self.shape.nodes - 1) // self.shape.depth - 1

    def warm_up(self) -> None:
        """Compile every form a round needs."""
        self.runner.warm_up([self._glue, self._branches[0], self._step])
        self.chooser.warm_up()
        lengths = torch.zeros(len(self.rows), dtype=torch.int64, device=self.runner.device)
        if self.runner.compile:
            self._grow_at_once(self.trees.to(lengths.device), lengths)

    def admit(self, message: Admit) -> None:
        self.rows[message.slot] = _Row(list(message.tokens[:-1]), 0, message.forecasts)
        self._in_glue.discard(message.slot)
        self.trees[message.slot] = ABSENT
        self.trees[message.slot, 0] = message.tokens[-1]
        self.chooser.set(message.slot, message.params)
        length = len(message.tokens) if message.prompt_length is None else message.prompt_length
        prompt, output = message.tokens[:length], message.tokens[length:]
        self.chooser.processors.clear(message.slot)
        self.chooser.process(message.slot, message.params, prompt=prompt, output=output, ends=message.ends)

    def release(self, slot: int) -> None:
        if self.rows[slot] is not None:
            self.rows[slot] = None
            self.trees[slot] = ABSENT
            self.chooser.clear(slot)

    def speculate(self) -> SpeculationSet:
        """Glue, forecast and branch steps for the trees now under verification."""
        self._catch_up()
        batch, branches = len(self.rows), self.forecast.budget
        lengths, longest = self._lengths()
        tokens = self.trees.to(self.runner.device)
        self._in_glue = {slot for slot, row in enumerate(self.rows) if row is not None}
        forecasting = torch.tensor([row is not None and row.forecasts for row in self.rows])
        if forecasting.any():
            # Compiled for the shortest context only: it takes the compiler half a minute.
            short = longest + self.shape.depth < self.runner.contexts[0]
            plain = not (self.chooser.params.filtered or self.chooser.processors.active)
            at_once = self.runner.compile and short and plain
            if at_once:
                guesses, trees = self._grow_at_once(tokens, lengths)
            else:
                guesses, trees = self._grow_stepwise(tokens, lengths, longest)
        else:
            # The accepted part of the tree will be needed all the same.
            self.runner.forward(self._glue, tokens.clamp(min=0), lengths, longest=longest)
            return SpeculationSet(
                guesses=torch.full((batch, branches), ABSENT),
                trees=torch.full((batch, branches, self.shape.nodes - 1), ABSENT),
            )
        absent = ~forecasting[:, None]
        return SpeculationSet(
            guesses=guesses.cpu().masked_fill(absent, ABSENT),
            trees=trees.cpu().masked_fill(absent[..., None], ABSENT),
        )

    def _grow(
        self, forward: Callable[[RowPlan, Tensor], Tensor], score: Callable[[Tensor, Tensor], Tensor], tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The draft's half of a round: glue, forecast, K branch steps.

        Args:
            forward: plan and row tokens ``[B, R]`` to logits ``[B, R, V]``. score: logits and how
                far ahead of L each row's noise is ``[R]`` to scores. tokens: ``[B, W]``.

        Returns: guesses ``[B, N]`` and trees ``[B, N, W - 1]``.
        """
        scores = score(forward(self._glue, tokens.clamp(min=0)), self._depths)
        guesses = bonus_guesses(scores, tokens, self._parents, self._nodes, self._ranks, max(self.forecast.ranks) + 1)
        ranked, fed = [], guesses
        for step, plan in enumerate(self._branches):
            scores = score(forward(plan, fed), self._depths[self._nodes] + 1 + step)
            ranked.append(_best(scores, self._width))
            fed = ranked[-1][..., 0]
        return guesses, _comb_tokens(ranked)

    def _grow_stepwise(self, tokens: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        noise = self.chooser.noise(lengths)
        paths: Tensor | None = None

        def forward(plan: RowPlan, rows: Tensor) -> Tensor:
            nonlocal paths
            if self.chooser.processors.active:
                if plan is self._glue:
                    paths = self._paths.of(tokens)
                else:  # a branch: the path to its node, its guess, its own tokens so far
                    above = self._paths.of(tokens)[:, self._nodes] if plan is self._branches[0] else paths
                    assert above is not None
                    paths = torch.cat([above, rows[..., None]], dim=-1)
            return self.runner.forward(plan, rows, lengths, longest=longest)

        def score(logits: Tensor, ahead: Tensor) -> Tensor:
            return self.chooser.scores(logits, None if noise is None else noise[:, ahead], paths)

        return self._grow(forward, score, tokens)

    @torch.no_grad()
    def _grow_at_once(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The same as one compiled function: the small draft's time is mostly that of being
        called. Noise is zero while nothing samples; filters and processors it cannot do."""
        if self._whole is None:
            grow, runner, context = self._grow, self.runner, self.runner.contexts[0]

            def tree(tokens: Tensor, lengths: Tensor, temperature: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
                return grow(
                    lambda plan, rows: runner.logits(plan, rows, lengths, context),
                    lambda logits, ahead: torch.addcmul(logits, noise[:, ahead], temperature[:, None, None]),
                    tokens,
                )

            self._whole = runner.compiled(tree)
        noise = self.chooser.noise(lengths)
        return self._whole(tokens, lengths, self.chooser.params.temperature, self._silence if noise is None else noise)

    def commit(self, frame: OutcomeFrame, speculation: SpeculationSet) -> Tensor:
        """Take in an outcome; the next trees are then those of the hits. Returns hit ``[B]``."""
        moves: list[tuple[int, int, int]] = []
        for slot, state in enumerate(frame.states.tolist()):
            row = self.rows[slot]
            if row is None or state != RowState.ACTIVE:
                self.release(slot)
                continue
            node = int(frame.nodes[slot])
            path = [0, *self.shape.path(node)]
            start = len(row.tokens)
            row.tokens.extend(self.trees[slot, path].tolist())
            if self.chooser.processors.active:
                self.chooser.processors.commit(slot, [*row.tokens[start + 1 :], int(frame.bonus[slot])])
            if slot in self._in_glue:
                row.cached = len(row.tokens)
                if node > self.shape.depth:  # off the chain: its keys stand in scratch
                    moves.append((slot, node - self.shape.depth - 1, start + self.shape.depths[node]))
        if moves:
            slots, scratch, positions = (torch.tensor(column) for column in zip(*moves, strict=True))
            self.runner.cache.keep(slots, scratch, positions)
        trees, hit = lookup(frame.nodes, frame.bonus, speculation, self._nodes.cpu())
        active = frame.states == RowState.ACTIVE
        self.trees = trees.masked_fill(~active[:, None], ABSENT)
        return hit & active

    def waiting(self, active: Tensor, hit: Tensor, *, jit: bool) -> Tensor:
        """Rows ``[B]`` bool that wait for ``draft_now``: those that missed, unless their fallback
        is to go on plainly."""
        waits = torch.tensor([row is not None and (jit or not row.forecasts) for row in self.rows])
        return active & ~hit & waits

    def draft_now(self, missed: Tensor) -> Tensor:
        """Draft for the rows that missed, while the verifier waits (fallback ``jit``).

        Args: missed ``[B]`` bool. Returns: trees ``[B, W - 1]``, ``ABSENT`` in other rows.
        """
        self._catch_up()
        lengths, longest = self._lengths()
        noise = self.chooser.noise(lengths)
        fed, ranked = self.trees[:, :1].clamp(min=0).to(self.runner.device), []
        paths: Tensor | None = None
        for step in range(self.shape.depth):
            logits = self.runner.forward(self._step, fed, lengths + step, longest=longest + step)
            scores = self.chooser.scores(logits, None if noise is None else noise[:, step : step + 1], paths)
            ranked.append(_best(scores, self._width))
            fed = ranked[-1][..., 0]
            if self.chooser.processors.active:
                paths = fed[..., None] if paths is None else torch.cat([paths, fed[..., None]], dim=-1)
        drafted = _comb_tokens(ranked)[:, 0].cpu().masked_fill(~missed[:, None], ABSENT)
        self.trees[:, 1:] = torch.where(missed[:, None], drafted, self.trees[:, 1:])
        return drafted

    def _lengths(self) -> tuple[Tensor, int]:
        lengths = [len(row.tokens) if row is not None else 0 for row in self.rows]
        return torch.tensor(lengths, device=self.runner.device), max(lengths)

    def _catch_up(self) -> None:
        """Prefill what was committed without going through here."""
        for slot, row in enumerate(self.rows):
            if row is not None and row.cached < len(row.tokens):
                self.runner.prefill(slot, row.tokens[row.cached :], start=row.cached)
                row.cached = len(row.tokens)


def branch_plans(shape: TreeShape, forecast: Forecast) -> list[RowPlan]:
    """The K steps of all N branches. Step s feeds every branch its s-th token.

    Branch n continues node u: its rows attend the main slots of u's chain part, u's scratch
    slot if u is a leaf off the chain, and the branch's own earlier steps. Scratch slots: leaves
    of the tree first (as ``RowPlan.tree`` places them), then N for each step.
    """
    chain, leaves, budget = shape.depth + 1, shape.nodes - shape.depth - 1, forecast.budget
    scratch = leaves + budget * (shape.depth - 1)
    plans = []
    for step in range(shape.depth):
        mask = []
        for branch, node in enumerate(forecast.nodes):
            attended = {leaves + earlier * budget + branch for earlier in range(step)}
            if node >= chain:
                attended.add(node - chain)
            mask.append(tuple(slot in attended for slot in range(scratch + budget)))
        depths = [shape.depths[node] for node in forecast.nodes]
        plans.append(
            RowPlan(
                name=f"branch {step}",
                offsets=tuple(depth + 1 + step for depth in depths),
                # A leaf's own key stands in scratch, so main ends before its position.
                limits=tuple(d + (node < chain) for d, node in zip(depths, forecast.nodes, strict=True)),
                in_place=0,
                scratch_start=leaves + step * budget,
                scratch_mask=tuple(mask),
            )
        )
    return plans


def scratch_slots(shape: TreeShape, budget: int) -> int:
    """Scratch slots the draft's cache needs per sequence."""
    return shape.nodes - shape.depth - 1 + budget * shape.depth


def _best(scores: Tensor, width: int) -> Tensor:
    """The ``width`` best tokens ``[B, R, width]``, best first."""
    if width == 1:
        return scores.argmax(-1, keepdim=True)
    return scores.topk(width, dim=-1).indices


def _comb_tokens(ranked: list[Tensor]) -> Tensor:
    """Node tokens ``[B, R, W - 1]`` of combs from the ranked tokens of each depth ``[B, R, 1 + s]``."""
    chain = torch.stack([best[..., 0] for best in ranked], dim=-1)
    return torch.cat([chain, *[best[..., 1:] for best in ranked]], dim=-1)
