"""Rejection sampling over candidate trees: the emitted tokens have the target's law.

At a node, its children are tried in order. A child x drawn from ``draft_probs`` is accepted with
probability ``min(1, target_probs(x) / draft_probs(x))``; if it is not, ``target_probs`` becomes
the residual ``(target_probs - draft_probs)+`` renormalised, x leaves ``draft_probs`` (siblings
are drawn without replacement), and the next child is tried. If none is accepted, the bonus token
is drawn from what ``target_probs`` has become.

One child: Leviathan, Kalman, Matias 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv
2302.01318). Several: SpecInfer (Miao et al. 2023, arXiv 2305.09781), without replacement as in
Sequoia (Chen et al. 2024, arXiv 2402.12374).

A child without weight in what is left of ``draft_probs`` was not drawn but named by a rule that
knows only what is known anyway (n-gram, next rank): a point mass, accepted with probability
``target_probs(x)``, and x leaves ``target_probs`` otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..trees.shape import ABSENT, TreeShape
from .draft_probs import DraftProbs, normalized


class BonusLaw(NamedTuple):
    """What a rule leaves to be drawn, per sequence."""

    node: Tensor
    """``[B]`` int64, u: the deepest accepted node."""
    probs: Tensor
    """``[B, V]``, the law of the bonus token after u."""
    own: Tensor
    """``[B]`` bool: it is the target's own law (nothing after u was tried)."""


class NodeLaws(NamedTuple):
    """The law of a round, before any uniform number is looked at."""

    accept: Tensor
    """``[B, W]``: chance that a node is accepted, given that its parent is and its elder siblings
    are not. 0 for absent nodes; the root's means nothing."""
    bonus: Tensor
    """``[B, I, V]``: law of the bonus token after each inner node if no child of it is accepted."""
    tried: Tensor
    """``[B, I]`` bool: it has a child to try."""


class Siblings:
    """Who is whose child, as tensors; made once for a tree shape.

    ``inner`` ``[I]`` int64: the nodes with children, ascending; distributions come in this order.
    ``table`` ``[I, C]`` int64: their children in order, padded with -1. ``index`` ``[W]`` int64:
    place of a node in ``inner``, -1 for leaves.
    """

    def __init__(self, shape: TreeShape, device: torch.device | str = "cpu"):
        nodes = inner_nodes(shape)
        widest = max(len(shape.children(node)) for node in nodes)
        rows = [(*shape.children(node), *[-1] * (widest - len(shape.children(node)))) for node in nodes]
        index = [nodes.index(node) if node in nodes else -1 for node in range(shape.nodes)]
        self.inner = torch.tensor(nodes, device=device)
        self.table = torch.tensor(rows, device=device)
        self.index = torch.tensor(index, device=device)
        self.depths = shape.depth_index(device)
        self.ancestors = shape.ancestors(device)


def inner_nodes(shape: TreeShape) -> tuple[int, ...]:
    """Nodes with children, ascending ``[I]``: those a tree carries a draft distribution for."""
    return tuple(sorted(set(shape.parents)))


def node_laws(target_probs: Tensor, tokens: Tensor, draft: DraftProbs, siblings: Siblings) -> NodeLaws:
    """Acceptance chances and residuals of every inner node.

    Args:
        target_probs: ``[B, W, V]`` float, the target's law after each node.
        tokens: ``[B, W]`` int64 node tokens; what is no token (``ABSENT``) is never accepted.
        draft: ``[B, I, m]``, the law the children of each inner node were drawn from.

    Sums in the dtype of ``target_probs``.
    """
    vocabulary = target_probs.shape[-1]
    target = target_probs[:, siblings.inner]
    drawn = draft.dense(vocabulary).to(target.dtype)
    accept = target.new_zeros(tokens.shape)
    tried = torch.zeros(target.shape[:-1], dtype=torch.bool, device=target.device)
    for children in siblings.table.T:
        token = tokens[:, children.clamp(min=0)]
        there = (children >= 0) & (token >= 0) & (token < vocabulary)
        token = token.clamp(0, vocabulary - 1)[..., None]
        weight = drawn.gather(-1, token)
        # Without weight it is a point mass: min(1, target / 1).
        ratio = (target.gather(-1, token) / torch.where(weight > 0, weight, 1)).clamp(max=1).squeeze(-1)
        at = children.clamp(min=0).expand(len(tokens), -1)
        # Added: padding points at the root, and must not undo anybody's chance.
        accept.scatter_add_(1, at, torch.where(there, ratio, 0))
        # A rejected x has target < draft (or all of a point mass), hence no residual.
        residual = torch.where(weight > 0, target - drawn, target).clamp(min=0).scatter(-1, token, 0)
        mass = residual.sum(-1, keepdim=True)
        # No mass: the two laws are equal, rejection has no chance but that of rounding.
        residual = torch.where(mass > 0, residual / torch.where(mass > 0, mass, 1), target)
        target = torch.where(there[..., None], residual, target)
        drawn = torch.where(there[..., None], normalized(drawn.scatter(-1, token, 0)), drawn)
        tried |= there
    return NodeLaws(accept, target, tried)


def verify_rejection(
    target_probs: Tensor, tokens: Tensor, draft: DraftProbs, uniforms: Tensor, siblings: Siblings
) -> BonusLaw:
    """Accept a path, and say what the bonus token after it is drawn from.

    Args:
        target_probs, tokens, draft, siblings: as for :func:`node_laws`.
        uniforms: ``[B, W]`` in the open interval (0, 1), one per node, independent of the draft.
    """
    laws = node_laws(target_probs, tokens, draft, siblings)
    passed = uniforms < laws.accept  # strictly: at ratio 0 nothing passes
    accepted = torch.zeros_like(passed)
    taken = torch.zeros_like(laws.tried)
    for children in siblings.table.T:
        at = children.clamp(min=0)
        wins = passed[:, at] & (children >= 0) & ~taken
        accepted.scatter_(1, at.expand(len(tokens), -1), wins | accepted[:, at])
        taken |= wins
    accepted[:, 0] = True
    failed_above = ((~accepted)[:, None, :] & siblings.ancestors).any(-1)
    node = (siblings.depths * ~failed_above).argmax(-1)
    place = siblings.index[node]
    rows = torch.arange(len(tokens), device=tokens.device)
    own = (place < 0) | ~laws.tried[rows, place]
    return BonusLaw(node, torch.where(own[:, None], target_probs[rows, node], laws.bonus[rows, place]), own)


def draw_bonus(law: BonusLaw, noise: Tensor) -> Tensor:
    """The bonus token ``[B]`` int64: a sample of ``law.probs`` by Gumbel noise ``[B, V]`` that
    nothing before depended on."""
    return (law.probs.log() + noise).argmax(-1)


def chain_length(tokens: Tensor) -> Tensor:
    """How many candidates of chains ``[B, K]`` are there ``[B]`` int64: up to the first ``ABSENT``."""
    return (tokens != ABSENT).long().cumprod(-1).sum(-1)
