"""Rejection sampling over candidate trees: the emitted tokens have the target's distribution.

At a node, its children are tried in order. A child x drawn from ``draft_probs`` is accepted with
probability ``min(1, target_probs(x) / draft_probs(x))``; if it is not, ``target_probs`` becomes
the residual ``(target_probs - draft_probs)+`` renormalised, x is removed from ``draft_probs``
(siblings are drawn without replacement), and the next child is tried. If none is accepted, the bonus
token is drawn from the ``target_probs`` that remain.

One child: Leviathan, Kalman, Matias 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv
2302.01318). Several: SpecInfer (Miao et al. 2023, arXiv 2305.09781), without replacement as in
Sequoia (Chen et al. 2024, arXiv 2402.12374).

A child without weight in the remaining ``draft_probs`` was not drawn. It was named by a rule without
randomness of its own (n-gram, next rank), so it is a point mass: accepted with probability
``target_probs(x)``; otherwise x is removed from ``target_probs``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..trees.shape import ABSENT, TreeShape
from .draft_probs import DraftProbs, normalized


class BonusLaw(NamedTuple):
    """The accepted node and the distribution of the bonus token, per sequence."""

    node: Tensor
    """``[B]`` int64, u: the deepest accepted node."""
    probs: Tensor
    """``[B, V]``: distribution of the bonus token after u."""
    own: Tensor
    """``[B]`` bool: that is the target's own distribution (no child of u was tried)."""


class NodeLaws(NamedTuple):
    """The probabilities of a round's outcomes, before any uniform number is used."""

    accept: Tensor
    """``[B, W]``: probability that a node is accepted, given that its parent is and the siblings before it
    are not. 0 for absent nodes; the root's is meaningless."""
    bonus: Tensor
    """``[B, I, V]``: distribution of the bonus token after each inner node if none of its children is accepted."""
    tried: Tensor
    """``[B, I]`` bool: the node has a child to try."""


class Siblings:
    """The children of a tree shape's nodes as tensors; made once.

    Attributes:
        inner: ``[I]`` int64, the nodes with children, ascending; distributions come in this order.
        table: ``[I, C]`` int64, their children in order, padded with -1.
        index: ``[W]`` int64, position of a node in ``inner``, -1 for leaves.
        depths: ``[W]`` int64.
        ancestors: ``[W, W]`` bool.
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
    """Returns the nodes with children, ascending ``[I]``: a tree carries a draft distribution for each."""
    return tuple(sorted(set(shape.parents)))


def node_laws(target_probs: Tensor, tokens: Tensor, draft: DraftProbs, siblings: Siblings) -> NodeLaws:
    """Returns acceptance probabilities and residuals of every inner node, in the dtype of ``target_probs``.

    Args:
        target_probs: ``[B, W, V]`` float, the target's distribution after each node.
        tokens: ``[B, W]`` int64 node tokens; ``ABSENT`` and invalid tokens are never accepted.
        draft: ``[B, I, m]``, the distribution that the children of each inner node were drawn from.
        siblings: of the tree's shape.
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
        # A point mass where it has no weight: min(1, target / 1).
        ratio = (target.gather(-1, token) / torch.where(weight > 0, weight, 1)).clamp(max=1).squeeze(-1)
        at = children.clamp(min=0).expand(len(tokens), -1)
        # Added, since padding points at the root.
        accept.scatter_add_(1, at, torch.where(there, ratio, 0))
        # A rejected x has target < draft, or was a point mass: it has no residual.
        residual = torch.where(weight > 0, target - drawn, target).clamp(min=0).scatter(-1, token, 0)
        mass = residual.sum(-1, keepdim=True)
        # No mass: the two distributions are equal, and only rounding can reject.
        residual = torch.where(mass > 0, residual / torch.where(mass > 0, mass, 1), target)
        target = torch.where(there[..., None], residual, target)
        drawn = torch.where(there[..., None], normalized(drawn.scatter(-1, token, 0)), drawn)
        tried |= there
    return NodeLaws(accept, target, tried)


def verify_rejection(
    target_probs: Tensor, tokens: Tensor, draft: DraftProbs, uniforms: Tensor, siblings: Siblings
) -> BonusLaw:
    """Accepts a path, and returns the distribution of the bonus token after it.

    Args:
        target_probs: as for :func:`node_laws`.
        tokens: likewise.
        draft: likewise.
        siblings: likewise.
        uniforms: ``[B, W]`` in the open interval (0, 1), one per node, independent of the draft.
    """
    laws = node_laws(target_probs, tokens, draft, siblings)
    passed = uniforms < laws.accept  # strictly: a ratio of 0 never passes
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
    """Returns the bonus token ``[B]`` int64: a sample of ``law.probs`` by Gumbel noise ``[B, V]``, which must be
    independent of everything used so far."""
    return (law.probs.log() + noise).argmax(-1)


def chain_length(tokens: Tensor) -> Tensor:
    """Returns the length ``[B]`` int64 of chains ``[B, K]``: the candidates before the first ``ABSENT``."""
    return (tokens != ABSENT).long().cumprod(-1).sum(-1)
