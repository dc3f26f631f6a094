"""A draft's distribution: m tokens and their probabilities, as drawn from, sent and verified.

Rules that compare probabilities (``rejection``, ``block``) are exact for *any* draft distribution, as long as
the candidates were drawn from it and are verified with it. So a distribution is made once, by the draft, and
travels with its candidates; no part of it is recomputed. The draft keeps its m most probable tokens and
renormalises: that *is* its distribution, not an approximation of another one. ``m = V`` is the full row.

A draft that does not sample (n-gram, greedy) is a point mass: all weight on its candidate, or no
weight at all (``DraftProbs.nothing``). The rules treat both alike: a candidate without weight was
named, not drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..sampling import SamplingTensors, filter_logits
from ..trees.shape import ABSENT


@dataclass(frozen=True, slots=True, eq=False)
class DraftProbs:
    """Draft distributions of any batch shape R, over m tokens each. All other tokens have probability 0."""

    tokens: Tensor
    """``[*R, m]`` int64."""
    probs: Tensor
    """``[*R, m]`` float, sum 1 (or all 0: nothing was drawn)."""

    @classmethod
    def nothing(cls, *shape: int, device: torch.device | str = "cpu") -> Self:
        """Returns distributions without any weight; ``shape`` is ``(*R, m)``."""
        return cls(torch.zeros(shape, dtype=torch.int64, device=device), torch.zeros(shape, device=device))

    @classmethod
    def point(cls, tokens: Tensor) -> Self:
        """Returns point masses on ``tokens`` ``[*R]``; ``ABSENT`` gets no weight."""
        return cls(tokens[..., None], (tokens != ABSENT)[..., None].to(torch.float32))

    @classmethod
    def of_logits(cls, logits: Tensor, support: int) -> Self:
        """Returns the distributions of a draft that keeps its ``support`` most probable tokens.

        Args:
            logits: ``[*R, V]`` float, divided by the temperature, dropped tokens at -inf; the maximum is finite.
            support: at least 1; V or more keeps the whole row.

        Returns:
            m = min(support, V) tokens, in descending order of probability (whole rows: in order of ids).
        """
        vocabulary = logits.shape[-1]
        if support >= vocabulary:
            tokens = torch.arange(vocabulary, device=logits.device).expand(logits.shape)
        else:
            logits, tokens = logits.topk(support, dim=-1)
        return cls(tokens, logits.softmax(-1))

    def __getitem__(self, index: Any) -> Self:
        """Returns some of the distributions; ``index`` is over R."""
        return type(self)(self.tokens[index], self.probs[index])

    def dense(self, vocabulary: int) -> Tensor:
        """Returns whole rows ``[*R, V]``, each with sum 1 or 0.

        A link may deliver anything: invalid ids, and weights that are not probabilities, are ignored, and the
        rest is renormalised. (The argmax of log weight plus noise draws in proportion to the weights, so for an
        honest draft that is the distribution it drew from.)
        """
        known = (self.tokens >= 0) & (self.tokens < vocabulary) & (self.probs > 0) & (self.probs <= 1)
        rows = self.probs.new_zeros((*self.probs.shape[:-1], vocabulary))
        rows.scatter_add_(-1, self.tokens.clamp(0, vocabulary - 1), torch.where(known, self.probs, 0))
        return normalized(rows)

    def draw(self, noise: Tensor, count: int = 1) -> Tensor:
        """Draws ``count`` different tokens, in order, without replacement.

        Args:
            noise: ``[*R, m]`` Gumbel noise of the m tokens.

        Returns:
            ``[*R, count]`` int64, ``ABSENT`` where no weight is left. The first is a
            sample of the distribution, each further one of the rest of it, renormalised (Gumbel
            top-k: Kool, van Hoof, Welling 2019, arXiv 1903.06059).
        """
        keys = self.probs.log() + noise
        best, index = keys.topk(min(count, keys.shape[-1]), dim=-1)
        drawn = self.tokens.gather(-1, index).masked_fill(best == -torch.inf, ABSENT)
        return torch.nn.functional.pad(drawn, (0, count - drawn.shape[-1]), value=ABSENT)


def normalized(rows: Tensor) -> Tensor:
    """Divides rows ``[*R, V]`` of weights by their sums; rows of zeros stay."""
    mass = rows.sum(-1, keepdim=True)
    return torch.where(mass > 0, rows / torch.where(mass > 0, mass, 1), rows)


def scaled_logits(logits: Tensor, params: SamplingTensors) -> Tensor:
    """Returns logits ``[B, R, V]`` divided by temperature and filtered; their softmax gives the probabilities.

    Rows of temperature 0 are meaningless: no rule compares probabilities for them.
    """
    if params.filtered:
        return filter_logits(logits, params)
    temperature = params.temperature[:, None, None]
    return logits.to(torch.float32) / torch.where(temperature > 0, temperature, 1.0)
