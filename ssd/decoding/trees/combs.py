"""From scores to the candidates of a comb."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .shape import ABSENT


def noise_at(noise: Tensor, ahead: Tensor) -> Tensor:
    """Rows ``ahead [B, R]`` of noise ``[B, horizon, V]``."""
    return noise[torch.arange(len(noise), device=noise.device)[:, None], ahead]


def best_tokens(scores: Tensor, width: int) -> Tensor:
    """The ``width`` best tokens ``[B, R, width]``, best first; ``ABSENT`` where no more are allowed."""
    if width == 1:
        return scores.argmax(-1, keepdim=True)
    best = scores.topk(width, dim=-1)
    return best.indices.masked_fill(best.values == -torch.inf, ABSENT)


def comb_tokens(ranked: list[Tensor], siblings: Sequence[int]) -> Tensor:
    """Node tokens ``[B, R, W - 1]`` of combs with ``siblings [K]`` from the ranked tokens of each depth drafted
    ``[B, R, n]``, of which those beyond a depth's siblings are left out; ``ABSENT`` below those."""
    ranked = [*ranked, *[torch.full_like(ranked[-1], ABSENT)] * (len(siblings) - len(ranked))]
    chain = torch.stack([best[..., 0] for best in ranked], dim=-1)
    beside = [best[..., 1 : 1 + count] for best, count in zip(ranked, siblings, strict=True)]
    return torch.cat([chain, *beside], dim=-1)
