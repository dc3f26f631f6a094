"""Candidates drawn from a distribution that travels with them (``verify: rejection | block``). ``verifier.judge`` is
the verifier's half."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...decoding.forecast.base import Forecast
from ...decoding.noise import DRAFT_STREAM, derive, gumbel_at
from ...decoding.sampling import SamplingTensors
from ...decoding.trees.shape import ABSENT, TreeShape
from ...decoding.verify.draft_probs import DraftProbs, scaled_logits
from ...decoding.verify.saguaro import downscale
from ..round.frames import ProbsLayout
from ..sampling.scorers import ExactScorer
from ..sampling.walk import Rows


class CandidateSampler:
    """Draws candidates, and returns the distributions they were drawn from.

    Args:
        shape: a comb.
        forecast: its fan-out is the number of tokens that Saguaro sampling scales down.
        probs: how many tokens a distribution keeps, and how it travels.
        scale: C of Saguaro sampling.
    """

    def __init__(self, shape: TreeShape, forecast: Forecast, probs: ProbsLayout, *, scale: float = 1.0):
        self.probs, self._scale = probs, scale
        self._width = 1 + max(shape.siblings)
        self._fan_out = [forecast.fan_out[node] for node in shape.chain]

    def undrawn(self, *shape: int) -> DraftProbs:
        """Returns the distributions ``[*shape, I, m]`` of trees that were not drawn: no weight on any token."""
        return DraftProbs.nothing(*shape, self.probs.inner, self.probs.size)

    def children(self, logits: Tensor, params: SamplingTensors, roots: Tensor, depth: int) -> tuple[Tensor, DraftProbs]:
        """Draws the candidates below chain nodes of one depth.

        Args:
            logits: ``[B, R, V]`` of the draft after the nodes.
            roots: ``[B, R]`` int64, the position of each tree's root.

        Returns:
            tokens ``[B, R, n]``, the chain's first, the widest depth's number of them, and the distributions
            ``[B, R, m]`` they were drawn from. In rows of temperature 0: the best tokens, drawn from nothing.
        """
        best = logits.topk(self._width, dim=-1)
        greedy = best.indices.masked_fill(best.values == -torch.inf, ABSENT)
        scaled = downscale(scaled_logits(logits, params), self._fan_out[depth], self._scale)
        draft = DraftProbs.of_logits(scaled, self.probs.size)
        # A grammar may allow no token that the draft has.
        draft = DraftProbs(draft.tokens, draft.probs.nan_to_num(0))
        seeds = derive(params.seed[:, None], DRAFT_STREAM, roots)
        noise = gumbel_at(seeds, torch.full_like(roots, depth), draft.tokens)
        sampled = (params.temperature > 0)[:, None, None]
        tokens = torch.where(sampled, draft.draw(noise, self._width), greedy)
        return tokens, DraftProbs(draft.tokens, draft.probs * sampled)


class DrawingScorer(ExactScorer):
    """Draws the candidates of one walk. Bonus tokens are guessed with plain decoding's noise under every rule, because
    the verifier draws them with it.

    Args:
        sampler: draws.
        lengths: L ``[B]``.
    """

    def __init__(self, *given: Any, sampler: CandidateSampler, lengths: Tensor):
        super().__init__(*given)
        self._sampler, self._lengths = sampler, lengths
        self._drawn: list[DraftProbs] = []

    def outcomes(self, logits: Tensor, rows: Rows, paths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        noiseless, scores = self._sampling.exact(logits, self._noise, rows.ahead, paths)
        return scores, noiseless

    def children(self, logits: Tensor, rows: Rows, paths: Tensor | None) -> Tensor:
        logits = self._sampling.processed(logits, paths)
        roots = self._lengths[:, None] + rows.ahead - rows.step
        tokens, drawn = self._sampler.children(logits, self._sampling.params, roots, rows.step)
        self._drawn.append(drawn)
        return tokens

    def drawn(self, depth: int) -> DraftProbs:
        return stacked(self._drawn, depth)


def stacked(steps: list[DraftProbs], depth: int) -> DraftProbs:
    """Joins the distributions of each depth drafted ``[B, R, m]`` to those of combs of ``depth`` ``[B, R, I, m]``, on
    the host, ready to be sent. Depths below have no weight."""
    last = steps[-1]
    empty = DraftProbs(torch.zeros_like(last.tokens), torch.zeros_like(last.probs))
    steps = [*steps, *[empty] * (depth - len(steps))]
    return DraftProbs(
        torch.stack([step.tokens for step in steps], dim=2).cpu(),
        torch.stack([step.probs for step in steps], dim=2).cpu(),
    )
