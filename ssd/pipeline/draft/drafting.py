"""Chooses how the draft model drafts: branches for a round's outcomes, and chains for the rows that missed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from ...decoding.trees.shape import ABSENT
from ...decoding.verify.draft_probs import DraftProbs
from ..sampling.selection import Selector
from ..sampling.walk import ChainSteps, never
from .branches import BranchSteps
from .executors import DraftBatch, DraftModel, Executor, Grown, InParts, StepByStep, Whole


class Drafting:
    """Runs the draft model over batches of slots. ``DraftWorker`` knows the sequences.

    Args:
        model: the draft.
        lookaheads: depths that may be drafted.
        anytime: whether a tree ends when the verifier waits for it.
    """

    def __init__(self, model: DraftModel, *, lookaheads: tuple[int, ...], anytime: bool):
        self._model, self._lookaheads = model, lookaheads
        self._anytime = anytime and model.mask is None  # the only forward of a parallel draft cannot end early
        self.branches = BranchSteps(model.shape, model.forecast.budget, model.runner.device)
        self._chain = ChainSteps("chain")
        self.stepwise = StepByStep(model, self.branches, self._chain)
        self.fused = (InParts if self._anytime else Whole)(model, self.branches, self._chain)

    @property
    def samples(self) -> bool:
        """Whether candidates are drawn: some slot samples under a rule that compares probabilities."""
        return self._model.sampler is not None and self._model.sampling.params.random

    def fuses(self, longest: int) -> bool:
        """Whether walks above this length run as compiled functions. These take half a minute to compile, so they exist
        for the shortest context tier only; and they cannot draw candidates."""
        short = longest + self._model.shape.depth < self._model.runner.contexts[0]
        return self._model.runner.fuses and short and not self.samples

    def warm_up(self, selector: Selector) -> None:
        """Compiles every form that a round needs."""
        model, runner = self._model, self._model.runner
        nodes = torch.zeros(runner.batch, model.forecast.budget, dtype=torch.int64, device=runner.device)
        runner.warm_up([self.branches.glue])
        for steps, depth in product((self._chain, self.branches), (1,) if model.mask is None else self._lookaheads):
            rows = steps.rows(0, nodes) if model.mask is None else steps.together(depth, nodes)
            runner.warm_up([rows.plan], rows.layout)
        for count in selector.counts if runner.fuses else ():
            model.sampling.select(selected := selector.first(count))
            lengths = torch.zeros(count, dtype=torch.int64, device=runner.device)
            trees = torch.full((count, model.shape.nodes), ABSENT, device=runner.device)
            for params, depth in product(self.fused.kinds, self._lookaheads):
                model.sampling.set(0, params)
                self.fused.grow(DraftBatch(trees, lengths, selected.index), 0, depth)
                self.fused.chains(DraftBatch(trees[:, :1].clamp(min=0), lengths, selected.index), 0, depth)
        model.sampling.clear(0)

    def glue(self, batch: DraftBatch, longest: int) -> None:
        """Computes only the keys and values of the trees."""
        tokens, lengths, slots = batch
        self._model.runner.forward(self.branches.glue, tokens.clamp(min=0), lengths, longest=longest, slots=slots)

    def grow(self, batch: DraftBatch, longest: int, depth: int, bell: Callable[[], bool] = never) -> Grown:
        """As ``Executor.grow``. ``bell``: whether the verifier waits, which ends the trees of an anytime draft."""
        return self._executor(longest).grow(batch, longest, depth, self._ended(bell) if self._anytime else never)

    def chains(self, batch: DraftBatch, longest: int, depth: int) -> tuple[Tensor, DraftProbs | None]:
        """As ``Executor.chains``."""
        return self._executor(longest).chains(batch, longest, depth)

    def _executor(self, longest: int) -> Executor:
        return self.fused if self.fuses(longest) else self.stepwise

    def _ended(self, bell: Callable[[], bool]) -> Callable[[], bool]:
        """The bell, asked when the step under way is done: a GPU's steps could not be taken back once launched."""
        if self._model.runner.device.type != "cuda":
            return bell

        def ended() -> bool:
            torch.cuda.current_stream().synchronize()
            return bell()

        return ended
