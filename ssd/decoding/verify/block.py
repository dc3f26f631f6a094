"""Block verification: a chain accepted or rejected as a whole, never shorter on average than
token by token, with the target's law.

With ``w_0 = 1`` and ``w_i = min(1, w_(i-1) · target(x_i) / draft(x_i))``, prefix i of K candidates
is accepted with chance

    h_i = R_i / (R_i + 1 - w_i),  R_i = Σ_x max(w_i · target(x | x_1..i) - draft(x | x_1..i), 0),  i < K
    h_K = w_K

independently, and the *longest* accepted prefix counts. After prefix i < K the bonus token is
drawn from ``max(w_i · target - draft, 0)`` renormalised, after all K from the target's own law.

Source: Sun, Mendlovic, Leviathan, Aharoni, Ro, Beirami, Suresh, "Block Verification Accelerates
Speculative Decoding", 2024, arXiv 2403.10444, Algorithm 2. Chains that end early (a candidate
after which drafting stopped is still verified) are chains of that length.

Unlike token-wise rejection the outcome depends on candidates *beyond* the accepted prefix. So the
draft's noise at a position may not be used again by the next round's candidate there: it is keyed
by the root's position and the depth (``ssd.pipeline.sampling.rules``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .draft_probs import DraftProbs, normalized
from .rejection import BonusLaw, chain_length


class PrefixLaws(NamedTuple):
    """The law of a round, before any uniform number is looked at."""

    accept: Tensor
    """``[B, K]``: h_1 .. h_K; 0 beyond the chain's end."""
    bonus: Tensor
    """``[B, K + 1, V]``: law of the bonus token after each prefix."""
    length: Tensor
    """``[B]`` int64: candidates there are."""


def prefix_laws(target_probs: Tensor, tokens: Tensor, draft: DraftProbs) -> PrefixLaws:
    """Acceptance chances and residuals of every prefix.

    Args:
        target_probs: ``[B, K + 1, V]`` float, the target's law after the root and each candidate.
        tokens: ``[B, K]`` int64 candidates; the chain ends before the first ``ABSENT``.
        draft: ``[B, K, m]``, the law each candidate was drawn from; a candidate without weight
            in it is a point mass.

    Sums in the dtype of ``target_probs``.
    """
    batch, lookahead = tokens.shape
    vocabulary = target_probs.shape[-1]
    # A candidate that is no token ends the chain too: a draft may send anything.
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
    w = torch.stack(joint, dim=1)  # w_0 .. w_K
    depths = torch.arange(lookahead + 1, device=tokens.device)
    inside = depths < length[:, None]  # prefixes with a candidate after them
    residual = (w[:, :-1, None] * target_probs[:, :-1] - drawn).clamp(min=0)
    mass = residual.sum(-1)
    left = mass + 1 - w[:, :-1]
    # 0 / 0: the draft is right so far and right about what follows.
    partly = torch.where(left > 0, mass / torch.where(left > 0, left, 1), 1)
    chance = torch.cat([partly, w[:, -1:]], dim=1)
    chance = torch.where(inside, chance, w).masked_fill(depths > length[:, None], 0)
    use = inside[:, :-1, None] & (mass > 0)[..., None]
    bonus = torch.where(use, normalized(residual), target_probs[:, :-1])
    return PrefixLaws(chance[:, 1:], torch.cat([bonus, target_probs[:, -1:]], dim=1), length)


def verify_block(target_probs: Tensor, tokens: Tensor, draft: DraftProbs, uniforms: Tensor) -> BonusLaw:
    """Accept the longest prefix that passes, and say what the bonus token is drawn from.

    Args:
        target_probs, tokens, draft: as for :func:`prefix_laws`.
        uniforms: ``[B, K]`` in the open interval (0, 1), independent of the draft and each other.

    Returns: with node i for prefix i, as in a chain-shaped tree.
    """
    laws = prefix_laws(target_probs, tokens, draft)
    depths = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    node = (depths * (uniforms < laws.accept)).amax(-1)
    rows = torch.arange(len(tokens), device=tokens.device)
    return BonusLaw(node, laws.bonus[rows, node], node == laws.length)
