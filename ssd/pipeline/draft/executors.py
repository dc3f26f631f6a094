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
from ..sampling.walk import ChainSteps, Frontier, Walk, fused_forward, never, single_forward, walked
from .branches import BranchSteps, branched
from .sampler import CandidateSampler, DrawingScorer

Steps = BranchSteps | ChainSteps
Body = Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftModel:
    """The draft model, and everything its candidates are chosen with."""

    runner: ForwardRunner
    """Of the draft, over the same slots as the verifier's."""
    shape: TreeShape
    """The candidate tree."""
    forecast: Forecast
    """Chooses the outcomes that get a branch."""
    sampling: SlotSampling
    """Of the slots' requests."""
    copying: CopyBias
    """Added to the draft's logits."""
    sampler: CandidateSampler | None = None
    """Draws the candidates under ``rejection`` and ``block``; None under ``coupled``."""


class DraftBatch(NamedTuple):
    """The slots of a walk, which the sampling state has selected."""

    tokens: Tensor
    """int64, the trees under verification ``[B, W]``, or the roots ``[B, 1]``."""
    lengths: Tensor
    """int64 ``[B]``, L."""
    longest: int
    """The greatest L in use."""
    slots: Tensor | None = None
    """int64 ``[B]``; None: all slots."""


class Grown(NamedTuple):
    """Branches for the likeliest outcomes: nodes ``[B, N]``, bonus tokens ``[B, N]``, candidates ``[B, N, W - 1]``, and
    the distributions ``[B, N, I, m]`` they were drawn from, on the host; None if they were not drawn."""

    nodes: Tensor
    guesses: Tensor
    trees: Tensor
    drawn: DraftProbs | None = None


class Executor(Protocol):
    """Runs the walks of a draft."""

    def grow(self, batch: DraftBatch, depth: int, ended: Callable[[], bool] = never) -> Grown:
        """Drafts branches for the trees of ``batch``, to ``depth`` or until ``ended`` says so."""
        ...

    def chains(self, batch: DraftBatch, depth: int) -> tuple[Tensor, DraftProbs | None]:
        """Drafts below the roots of ``batch``. Returns candidates ``[B, W - 1]``, and the distributions ``[B, I, m]``
        they were drawn from, if they were."""
        ...


class StepByStep:
    """One forward at a time, with exact scores: for any parameters, rules and contexts."""

    def __init__(self, model: DraftModel, branches: BranchSteps, chain: ChainSteps):
        self._model, self._branches, self._chain = model, branches, chain
        self._siblings, self._paths = model.shape.siblings, TreePaths(model.shape, model.runner.device)

    def grow(self, batch: DraftBatch, depth: int, ended: Callable[[], bool] = never) -> Grown:
        walk = self._walk(self._branches, batch)
        frontier = branched(walk, self._branches, self._model.forecast, batch.tokens)
        trees = comb_tokens(walked(walk.step, frontier, depth, ended), self._siblings)
        return Grown(frontier.nodes, frontier.fed, trees, walk.scorer.drawn(len(self._siblings)))

    def chains(self, batch: DraftBatch, depth: int) -> tuple[Tensor, DraftProbs | None]:
        walk = self._walk(self._chain, batch)
        trees = comb_tokens(walked(walk.step, walk.below(batch.tokens), depth), self._siblings)
        drawn = walk.scorer.drawn(len(self._siblings))
        return trees[:, 0], None if drawn is None else drawn[:, 0]

    def _walk(self, steps: Steps, batch: DraftBatch) -> Walk:
        model, (_, lengths, longest, slots) = self._model, batch
        given = model.sampling, 1 + max(self._siblings), model.sampling.noise(lengths), self._paths
        draws = model.sampler is not None and model.sampling.params.random
        scorer = DrawingScorer(*given, sampler=model.sampler, lengths=lengths) if draws else ExactScorer(*given)
        forward = single_forward(model.runner, lengths, longest, slots)
        return Walk(steps.rows, forward, scorer, model.copying.source(lengths, slots))


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

    def grow(self, batch: DraftBatch, depth: int, ended: Callable[[], bool] = never) -> Grown:
        return Grown(*self._run(self._tree, depth, batch, self._requested(batch)))

    def chains(self, batch: DraftBatch, depth: int) -> tuple[Tensor, None]:
        return self._run(self._below, depth, batch, self._requested(batch))[:, 0], None

    def _requested(self, batch: DraftBatch) -> Requested:
        return self._requests.requested(batch.tokens, batch.lengths)

    @torch.no_grad()
    def _run(
        self, body: Callable[[int], Body], number: int, batch: DraftBatch, requested: Requested, *more: Tensor | None
    ) -> Any:
        """Calls the compiled function ``body(number)``, which is made when first called."""
        form = body.__name__, number, len(batch.lengths), requested.adjustments is None
        if (run := self._functions.get(form)) is None:
            run = self._functions[form] = self._model.runner.compiled(body(number))
        return run(batch.tokens, batch.lengths, batch.slots, requested, *more)

    def _tree(self, depth: int) -> Body:
        def tree(tokens: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
            walk = self._walk(self._branches, *given)
            frontier = branched(walk, self._branches, self._model.forecast, tokens)
            return frontier.nodes, frontier.fed, comb_tokens(walked(walk.step, frontier, depth), self._siblings)

        return tree

    def _below(self, depth: int) -> Body:
        def chain(roots: Tensor, *given: Any) -> Tensor:
            walk = self._walk(self._chain, *given)
            return comb_tokens(walked(walk.step, walk.below(roots), depth), self._siblings)

        return chain

    def _walk(self, steps: Steps, lengths: Tensor, slots: Tensor | None, requested: Requested) -> Walk:
        model = self._model
        forward = fused_forward(model.runner, lengths, model.runner.contexts[0], slots)
        scorer = LikelyScorer(model.sampling, 1 + max(self._siblings), requested)
        return Walk(steps.rows, forward, scorer, model.copying.source(lengths, slots))


class InParts(Whole):
    """A tree's walk as several compiled functions, so that it can end early: the forecast, and each step."""

    def grow(self, batch: DraftBatch, depth: int, ended: Callable[[], bool] = never) -> Grown:
        requested = self._requested(batch)

        def step(number: int, frontier: Frontier) -> tuple[Tensor, Frontier]:
            fed, nodes, endings, _ = frontier
            children, fed, endings = self._run(self._part, number, batch, requested, fed, nodes, endings)
            return children, Frontier(fed, nodes, endings, None)

        nodes, guesses, endings = self._run(self._begin, 0, batch, requested)
        ranked = walked(step, Frontier(guesses, nodes, endings, None), depth, ended)
        return Grown(nodes, guesses, comb_tokens(ranked, self._siblings))

    def _begin(self, _: int) -> Body:
        def begin(tokens: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor | None]:
            walk = self._walk(self._branches, *given)
            frontier = branched(walk, self._branches, self._model.forecast, tokens)
            return frontier.nodes, frontier.fed, frontier.endings

        return begin

    def _part(self, number: int) -> Body:
        def advance(_: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor | None]:
            *rest, fed, nodes, endings = given
            walk = self._walk(self._branches, *rest)
            children, frontier = walk.step(number, Frontier(fed, nodes, endings, None))
            return children, frontier.fed, frontier.endings

        return advance
