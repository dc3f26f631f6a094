"""Block verification: decides about whole prefixes of a chain. It accepts at least as many tokens on
average as token-wise rejection, and keeps the target's distribution.

With ``w_0 = 1`` and ``w_i = min(1, w_(i-1) · target(x_i) / draft(x_i))``, prefix i of K candidates
is accepted with probability

    h_i = R_i / (R_i + 1 - w_i),  R_i = Σ_x max(w_i · target(x | x_1..i) - draft(x | x_1..i), 0),  i < K
    h_K = w_K

independently, and the *longest* accepted prefix counts. After prefix i < K the bonus token is
drawn from ``max(w_i · target - draft, 0)`` renormalised; after all K, from the target's distribution.

Source: Sun, Mendlovic, Leviathan, Aharoni, Ro, Beirami, Suresh, "Block Verification Accelerates
Speculative Decoding", 2024, arXiv 2403.10444, Algorithm 2. A chain that ends early is a chain
of that length: its last candidate is still verified.

Unlike token-wise rejection, the outcome depends on candidates *beyond* the accepted prefix. So the
next round's candidate at a position must not use the same draft noise: the noise is keyed
by the root's position and the depth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .draft_probs import DraftProbs, normalized
from .rejection import BonusLaw, chain_length


class PrefixLaws(NamedTuple):
    """The probabilities of a round's outcomes, before any uniform number is used."""

    accept: Tensor
    """``[B, K]``: h_1 ... h_K; 0 beyond the chain's end."""
    bonus: Tensor
    """``[B, K + 1, V]``: distribution of the bonus token after each prefix."""
    length: Tensor
    """``[B]`` int64: number of candidates."""


def prefix_laws(target_probs: Tensor, tokens: Tensor, draft: DraftProbs) -> PrefixLaws:
    """Returns acceptance probabilities and residuals of every prefix, in the dtype of ``target_probs``.

    Args:
        target_probs: ``[B, K + 1, V]`` float, the target's distribution after the root and each candidate.
        tokens: ``[B, K]`` int64 candidates; the chain ends before the first ``ABSENT``.
        draft: ``[B, K, m]``, the distribution each candidate was drawn from. A candidate without
            weight in it is a point mass.
    """
    batch, lookahead = tokens.shape
    vocabulary = target_probs.shape[-1]
    # An invalid token ends the chain too: a draft may send anything.
    tokens = torch.where((tokens >= 0) & (tokens < vocabulary), tokens, -1)
    length = chain_length(tokens)
    chosen = tokens.clamp(min=0)[..., None]
    drawn = draft.dense(vocabulary).to(target_probs.dtype)
    weight = drawn.gather(-1, chosen)
    drawn = torch.where(weight > 0, drawn, torch.zeros_like(drawn).scatter(-1, chosen, 1))
    ratio = (target_probs[:, :-1].gather(-1, chosen) / torch.where(weight > 0, weight, 1)).squeeze(-1)
    joint = [ratio.new_ones(batch)]
    for depth in range(lookahead):
        joint.append((joint[-1] * ratio[:, depth]).clamp(max=1))
    w = torch.stack(joint, dim=1)  # w_0 ... w_K
    depths = torch.arange(lookahead + 1, device=tokens.device)
    inside = depths < length[:, None]  # prefixes with a candidate after them
    residual = (w[:, :-1, None] * target_probs[:, :-1] - drawn).clamp(min=0)
    mass = residual.sum(-1)
    left = mass + 1 - w[:, :-1]
    # 0 / 0: the two distributions are equal up to here and after this prefix.
    partly = torch.where(left > 0, mass / torch.where(left > 0, left, 1), 1)
    chance = torch.cat([partly, w[:, -1:]], dim=1)
    chance = torch.where(inside, chance, w).masked_fill(depths > length[:, None], 0)
    use = inside[:, :-1, None] & (mass > 0)[..., None]
    bonus = torch.where(use, normalized(residual), target_probs[:, :-1])
    return PrefixLaws(chance[:, 1:], torch.cat([bonus, target_probs[:, -1:]], dim=1), length)


def verify_block(target_probs: Tensor, tokens: Tensor, draft: DraftProbs, uniforms: Tensor) -> BonusLaw:
    """Accepts the longest prefix that passes, and returns the distribution of the bonus token.

    Args:
        target_probs: as for :func:`prefix_laws`.
        tokens: likewise.
        draft: likewise.
        uniforms: ``[B, K]`` in the open interval (0, 1), independent of the draft and each other.

    Returns:
        the law with node i for prefix i, as in a tree that is a chain.
    """
    laws = prefix_laws(target_probs, tokens, draft)
    depths = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    node = (depths * (uniforms < laws.accept)).amax(-1)
    rows = torch.arange(len(tokens), device=tokens.device)
    return BonusLaw(node, laws.bonus[rows, node], node == laws.length)
