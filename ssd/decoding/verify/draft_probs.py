"""A draft's distribution as it is drawn from, sent and verified: m tokens and their probabilities.

Rules that compare probabilities (``rejection``, ``block``) are exact for *any* draft distribution
that is (i) truly the law the candidates were drawn from and (ii) the one they are judged by. So a
distribution is made once, by the draft, and travels with its candidates; nothing about it is
recomputed. Compact support: the draft keeps its m most probable tokens and renormalises. That
*is* its distribution then, no approximation of another one. ``m = V`` is the full row.

A draft that does not sample (n-gram, greedy) is a point mass: all weight on its candidate, or no
weight on anything (``DraftProbs.nothing``), which the rules read the same way: a candidate
without weight was not drawn but named.
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
    """Draft distributions of any batch shape R, over m tokens each. Tokens not named have none."""

    tokens: Tensor
    """``[*R, m]`` int64."""
    probs: Tensor
    """``[*R, m]`` float, sum 1 (or all 0: nothing was drawn)."""

    @classmethod
    def nothing(cls, *shape: int, device: torch.device | str = "cpu") -> Self:
        """No weight anywhere; ``shape`` is ``(*R, m)``."""
        return cls(torch.zeros(shape, dtype=torch.int64, device=device), torch.zeros(shape, device=device))

    @classmethod
    def point(cls, tokens: Tensor) -> Self:
        """All weight on one token each; ``tokens`` ``[*R]``, ``ABSENT`` gets none."""
        return cls(tokens[..., None], (tokens != ABSENT)[..., None].to(torch.float32))

    @classmethod
    def of_logits(cls, logits: Tensor, support: int) -> Self:
        """The distribution of a draft that keeps its ``support`` most probable tokens.

        Args:
            logits: ``[*R, V]`` float, over temperature, dropped tokens at -inf; a finite maximum.
            support: m >= 1; at least V keeps the whole row.

        Returns: with m = min(support, V), in falling order of probability (whole rows: in order
        of ids).
        """
        vocabulary = logits.shape[-1]
        if support >= vocabulary:
            tokens = torch.arange(vocabulary, device=logits.device).expand(logits.shape)
        else:
            logits, tokens = logits.topk(support, dim=-1)
        return cls(tokens, logits.softmax(-1))

    def __getitem__(self, index: Any) -> Self:
        """Some of them; ``index`` is over R."""
        return type(self)(self.tokens[index], self.probs[index])

    def dense(self, vocabulary: int) -> Tensor:
        """Whole rows ``[*R, V]``, each of sum 1 or 0.

        What came over a link may be anything: ids that are no tokens and weights that are no
        probabilities count as nothing, and the rest is renormalised (as argmax of log weight plus
        noise draws by weight, that is the law of the draw for honest weights of any sum).
        """
        known = (self.tokens >= 0) & (self.tokens < vocabulary) & (self.probs > 0) & (self.probs <= 1)
        rows = self.probs.new_zeros((*self.probs.shape[:-1], vocabulary))
        rows.scatter_add_(-1, self.tokens.clamp(0, vocabulary - 1), torch.where(known, self.probs, 0))
        return normalized(rows)

    def draw(self, noise: Tensor, count: int = 1) -> Tensor:
        """Draw ``count`` different tokens, in order, without replacement.

        Args:
            noise: ``[*R, m]`` Gumbel noise of the m tokens.

        Returns:
            ``[*R, count]`` int64, ``ABSENT`` where nothing with weight is left. The first is a
            sample of the distribution, each next one of what remains of it, renormalised (Gumbel
            top-k: Kool, van Hoof, Welling 2019, arXiv 1903.06059).
        """
        keys = self.probs.log() + noise
        best, index = keys.topk(min(count, keys.shape[-1]), dim=-1)
        drawn = self.tokens.gather(-1, index).masked_fill(best == -torch.inf, ABSENT)
        return torch.nn.functional.pad(drawn, (0, count - drawn.shape[-1]), value=ABSENT)


def normalized(rows: Tensor) -> Tensor:
    """Rows ``[*R, V]`` of weights over their sums; rows of zeros stay."""
    mass = rows.sum(-1, keepdim=True)
    return torch.where(mass > 0, rows / torch.where(mass > 0, mass, 1), rows)


def scaled_logits(logits: Tensor, params: SamplingTensors) -> Tensor:
    """Logits ``[B, R, V]`` over temperature and filtered: what softmax turns into probabilities.
    Rows of temperature 0 mean nothing here: no rule compares probabilities for them."""
    if params.filtered:
        return filter_logits(logits, params)
    temperature = params.temperature[:, None, None]
    return logits.to(torch.float32) / torch.where(temperature > 0, temperature, 1.0)
