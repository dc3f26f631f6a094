"""Ways to run the draft's walks: compiled as a whole, compiled in parts, or step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...decoding.forecast.base import Forecast
from ...decoding.processors import TreePaths
from ...decoding.text.copying import CopyBias
from ...decoding.trees.combs import comb_tokens
from ...decoding.trees.shape import TreeShape
from ...decoding.verify.draft_probs import DraftProbs
from ...models.runner import ForwardRunner
from ..sampling.scorers import ExactScorer, LikelyScorer, Requested, RequestTensors
from ..sampling.slots import SlotSampling
from ..sampling.walk import ChainSteps, Forward, Frontier, Scorer, Walk, fused_forward, never, single_forward, walked
from .at_once import AtOnce, Steps
from .branches import BranchSteps, branched
from .sampler import CandidateSampler, DrawingScorer

Body = Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftModel:
    """The draft model, and everything its candidates are chosen with."""

    runner: ForwardRunner
    """Of the draft, over the same slots as the verifier's."""
    shape: TreeShape
    forecast: Forecast
    sampling: SlotSampling
    copying: CopyBias
    sampler: CandidateSampler | None = None
    """Draws the candidates under ``rejection`` and ``block``; None under ``coupled``."""
    mask: int | None = None
    """The token that a parallel draft is fed for candidates that are not known yet; None: the draft is not parallel."""

    def walk(self, steps: Steps, forward: Forward, scorer: Scorer, batch: DraftBatch, depth: int) -> Walk:
        """Returns the walk of ``depth`` steps above the slots of a batch."""
        source = self.copying.source(batch.lengths, batch.slots)
        if self.mask is None:
            return Walk(steps.rows, forward, scorer, source)
        together = AtOnce(steps, forward, depth=depth, mask=self.mask)
        return Walk(together.rows, together.forward, scorer, source)


class DraftBatch(NamedTuple):
    """The slots of a walk, which the sampling state has selected."""

    tokens: Tensor
    """int64, the trees under verification ``[B, W]``, or the roots ``[B, 1]``."""
    lengths: Tensor
    """int64 ``[B]``, L."""
    slots: Tensor | None = None
    """int64 ``[B]``; None: all slots."""


class Grown(NamedTuple):
    """Branches ``[B, N]``: nodes, guesses of the bonus token, and candidates ``[B, N, W - 1]``."""

    nodes: Tensor
    guesses: Tensor
    trees: Tensor
    drawn: DraftProbs | None = None
    """``[B, N, I, m]`` on the host, the distributions they were drawn from, if they were."""


class Executor(Protocol):
    """Runs walks. ``longest`` is the greatest L in use."""

    def grow(self, batch: DraftBatch, longest: int, depth: int, ended: Callable[[], bool] = never) -> Grown:
        """Drafts branches for the trees, to ``depth`` or until ``ended`` says so."""
        ...

    def chains(self, batch: DraftBatch, longest: int, depth: int) -> tuple[Tensor, DraftProbs | None]:
        """Drafts candidates ``[B, W - 1]`` below the roots, and returns the distributions ``[B, I, m]`` they were drawn
        from, if they were."""
        ...


class StepByStep:
    """One forward at a time, with exact scores: for any parameters, rules and contexts."""

    def __init__(self, model: DraftModel, branches: BranchSteps, chain: ChainSteps):
        self._model, self._branches, self._chain = model, branches, chain
        self._siblings, self._paths = model.shape.siblings, TreePaths(model.shape, model.runner.device)

    def grow(self, batch: DraftBatch, longest: int, depth: int, ended: Callable[[], bool] = never) -> Grown:
        walk = self._walk(self._branches, batch, longest, depth)
        frontier = branched(walk, self._branches, self._model.forecast, batch.tokens)
        trees = comb_tokens(walked(walk.step, frontier, depth, ended), self._siblings)
        return Grown(frontier.nodes, frontier.fed, trees, walk.scorer.drawn(len(self._siblings)))

    def chains(self, batch: DraftBatch, longest: int, depth: int) -> tuple[Tensor, DraftProbs | None]:
        walk = self._walk(self._chain, batch, longest, depth)
        trees = comb_tokens(walked(walk.step, walk.below(batch.tokens), depth), self._siblings)
        drawn = walk.scorer.drawn(len(self._siblings))
        return trees[:, 0], None if drawn is None else drawn[:, 0]

    def _walk(self, steps: Steps, batch: DraftBatch, longest: int, depth: int) -> Walk:
        model, (_, lengths, slots) = self._model, batch
        given = model.sampling, 1 + max(self._siblings), model.sampling.noise(lengths), self._paths
        scorer = ExactScorer(*given)
        if model.sampler is not None and model.sampling.params.random:
            scorer = DrawingScorer(*given, sampler=model.sampler, lengths=lengths)
        return model.walk(steps, single_forward(model.runner, lengths, longest, slots), scorer, batch, depth)


class Whole:
    """A walk as one compiled function, because a small draft's time is mostly that of being called. Its scores are
    likely ones, and its context is that of the first tier."""

    def __init__(self, model: DraftModel, branches: BranchSteps, chain: ChainSteps):
        runner = model.runner
        self._model, self._branches, self._chain, self._siblings = model, branches, chain, model.shape.siblings
        self._requests = RequestTensors(model.sampling, model.shape, runner.batch, runner.vocabulary, runner.device)
        self._functions: dict[tuple[str, int, int, bool], Body] = {}
        """By name, depth or step, number of slots, and whether nothing but noise is asked for."""
        self.kinds = self._requests.kinds

    def grow(self, batch: DraftBatch, longest: int, depth: int, ended: Callable[[], bool] = never) -> Grown:
        return Grown(*self._run(self._tree, depth, batch, self._requested(batch)))

    def chains(self, batch: DraftBatch, longest: int, depth: int) -> tuple[Tensor, None]:
        return self._run(self._below, depth, batch, self._requested(batch))[:, 0], None

    def _requested(self, batch: DraftBatch) -> Requested:
        return self._requests.requested(batch.tokens, batch.lengths)

    @torch.no_grad()
    def _run(self, body: Callable[[int], Body], number: int, batch: DraftBatch, *given: Any) -> Any:
        """Calls the compiled function ``body(number)``, which is made at its first call, with ``batch`` and the
        ``Requested`` first."""
        form = body.__name__, number, len(batch.lengths), given[0].adjustments is None
        if (run := self._functions.get(form)) is None:
            run = self._functions[form] = self._model.runner.compiled(body(number))
        return run(batch, *given)

    def _tree(self, depth: int) -> Body:
        def tree(batch: DraftBatch, requested: Requested) -> tuple[Tensor, Tensor, Tensor]:
            walk = self._walk(self._branches, batch, requested, depth)
            frontier = branched(walk, self._branches, self._model.forecast, batch.tokens)
            return frontier.nodes, frontier.fed, comb_tokens(walked(walk.step, frontier, depth), self._siblings)

        return tree

    def _below(self, depth: int) -> Body:
        def chain(batch: DraftBatch, requested: Requested) -> Tensor:
            walk = self._walk(self._chain, batch, requested, depth)
            return comb_tokens(walked(walk.step, walk.below(batch.tokens), depth), self._siblings)

        return chain

    def _walk(self, steps: Steps, batch: DraftBatch, requested: Requested, depth: int) -> Walk:
        model, (_, lengths, slots) = self._model, batch
        forward = fused_forward(model.runner, lengths, model.runner.contexts[0], slots)
        scorer = LikelyScorer(model.sampling, 1 + max(self._siblings), requested)
        return model.walk(steps, forward, scorer, batch, depth)


class InParts(Whole):
    """A tree's walk as several compiled functions, so that it can end early: the forecast, and each step. Not for
    parallel drafts, which take all steps at once."""

    def grow(self, batch: DraftBatch, longest: int, depth: int, ended: Callable[[], bool] = never) -> Grown:
        requested = self._requested(batch)
        nodes, guesses, endings = self._run(self._begin, 0, batch, requested)

        def step(number: int, frontier: Frontier) -> tuple[Tensor, Frontier]:
            children, fed, endings = self._run(self._part, number, batch, requested, *frontier[:3])
            return children, Frontier(fed, nodes, endings)

        trees = comb_tokens(walked(step, Frontier(guesses, nodes, endings), depth, ended), self._siblings)
        return Grown(nodes, guesses, trees)

    def _begin(self, _: int) -> Body:
        def begin(batch: DraftBatch, requested: Requested) -> tuple[Tensor, Tensor, Tensor | None]:
            walk = self._walk(self._branches, batch, requested, 1)
            frontier = branched(walk, self._branches, self._model.forecast, batch.tokens)
            return frontier.nodes, frontier.fed, frontier.endings

        return begin

    def _part(self, number: int) -> Body:
        def advance(
            batch: DraftBatch, requested: Requested, fed: Tensor, nodes: Tensor, endings: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            walk = self._walk(self._branches, batch, requested, 1)
            children, frontier = walk.step(number, Frontier(fed, nodes, endings))
            return children, frontier.fed, frontier.endings

        return advance
