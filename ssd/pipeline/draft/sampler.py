"""Candidates drawn from a distribution that travels with them (``verify: rejection | block``). The verifier's half is
``verifier.judge``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...decoding.forecast.base import Forecast
from ...decoding.noise import DRAFT_STREAM, derive, gumbel_at
from ...decoding.sampling import SamplingTensors
from ...decoding.trees.shape import ABSENT, TreeShape
from ...decoding.verify.draft_probs import DraftProbs, scaled_logits
from ...decoding.verify.saguaro import downscale
from ..round.frames import ProbsLayout


class CandidateSampler:
    """The draft's half: candidates drawn from a distribution that goes along with them.

    Args:
        shape: a comb. forecast: whose fan-out says how many tokens are scaled. probs: how many
            tokens a distribution keeps, and how it travels. scale: C of Saguaro sampling.
    """

    def __init__(self, shape: TreeShape, forecast: Forecast, probs: ProbsLayout, *, scale: float = 1.0):
        self.probs, self._scale = probs, scale
        self._width = 1 + max(shape.siblings)
        self._fan_out = [forecast.fan_out[node] for node in shape.chain]

    def nothing(self, *shape: int) -> DraftProbs:
        """For ``shape`` trees: they were not drawn."""
        return DraftProbs.nothing(*shape, self.probs.inner, self.probs.size)

    def children(self, logits: Tensor, params: SamplingTensors, roots: Tensor, depth: int) -> tuple[Tensor, DraftProbs]:
        """Candidates below chain nodes of one depth.

        Args:
            logits: ``[B, R, V]`` of the draft after them. roots: ``[B, R]`` int64, position of each
                tree's root. depth: of the nodes the candidates continue.

        Returns:
            tokens ``[B, R, n]``, the chain's first, as many as the widest depth has, and what they were drawn from
            ``[B, R, m]``. In rows of temperature 0: the best tokens, drawn from nothing.
        """
        best = logits.topk(self._width, dim=-1)
        named = best.indices.masked_fill(best.values == -torch.inf, ABSENT)
        scaled = downscale(scaled_logits(logits, params), self._fan_out[depth], self._scale)
        draft = DraftProbs.of_logits(scaled, self.probs.size)
        seeds = derive(params.seed[:, None], DRAFT_STREAM, roots)
        noise = gumbel_at(seeds, torch.full_like(roots, depth), draft.tokens)
        sampled = (params.temperature > 0)[:, None, None]
        tokens = torch.where(sampled, draft.draw(noise, self._width), named)
        return tokens, DraftProbs(draft.tokens, draft.probs * sampled)


def stacked(steps: list[DraftProbs], depth: int) -> DraftProbs:
    """The distributions of each depth drafted ``[B, R, m]`` as those of combs of ``depth``
    ``[B, R, I, m]``, on the host, ready to be sent. Nothing was drawn below."""
    last = steps[-1]
    steps = [*steps, *[DraftProbs(torch.zeros_like(last.tokens), torch.zeros_like(last.probs))] * (depth - len(steps))]
    return DraftProbs(
        torch.stack([step.tokens for step in steps], dim=2).cpu(),
        torch.stack([step.probs for step in steps], dim=2).cpu(),
    )
