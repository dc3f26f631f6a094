"""From scores to the candidates of a comb."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .shape import ABSENT


def noise_at(noise: Tensor, ahead: Tensor | int) -> Tensor:
    """The noise ``[B, R, V]`` of rows that choose ``ahead`` positions after the first.

    Args:
        noise: ``[B, H, V]``, the positions after L in order.
        ahead: int64 ``[B, R]``, or one number for a single row per sequence (R = 1).
    """
    if isinstance(ahead, int):
        return noise[:, ahead : ahead + 1]
    return noise[torch.arange(len(noise), device=noise.device)[:, None], ahead]


def best_tokens(scores: Tensor, width: int) -> Tensor:
    """Returns the ``width`` best tokens ``[B, R, width]`` of ``scores [B, R, V]``, best first; ``ABSENT`` where fewer
    have a finite score."""
    if width == 1:
        return scores.argmax(-1, keepdim=True)
    best = scores.topk(width, dim=-1)
    return best.indices.masked_fill(best.values == -torch.inf, ABSENT)


def comb_tokens(ranked: Sequence[Tensor], siblings: Sequence[int]) -> Tensor:
    """Returns the node tokens ``[B, R, W - 1]`` of combs, ``ABSENT`` below the deepest depth drafted.

    Args:
        ranked: the ranked tokens ``[B, R, n]`` of each depth drafted; at least one.
        siblings: ``[K]``, the siblings of each depth. Ranks beyond them are dropped.
    """
    ranked = [*ranked, *[torch.full_like(ranked[-1], ABSENT)] * (len(siblings) - len(ranked))]
    chain = torch.stack([best[..., 0] for best in ranked], dim=-1)
    leaves = [best[..., 1 : 1 + count] for best, count in zip(ranked, siblings, strict=True)]
    return torch.cat([chain, *leaves], dim=-1)
