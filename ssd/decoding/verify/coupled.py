"""Coupled verification: from a candidate tree and the target's choice after every node to the outcome.

Draft and target choose with the same noise, so a candidate is accepted iff it *is* the target's
token. No probability is compared, and none crosses the link. The emitted tokens are the
target's own for the seed, whatever was drafted (Gumbel coupling: Daliri, Musco, Suresh 2024,
arXiv 2408.07978). Matching also verifies trees: at every node, the child that equals the
target's token is accepted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FAULT = -2
"""In place of the target's token where its logits choose none."""


class Outcome(NamedTuple):
    """The result of a round, ``[B]`` int64 each."""

    node: Tensor
    """u, the deepest accepted node (0: none is accepted)."""
    bonus: Tensor
    """t, the target's own token after u, or ``FAULT``."""


def chosen_tokens(logits: Tensor, scores: Tensor) -> Tensor:
    """Returns the target's token ``[..]`` int64 of each row: the best score's, or ``FAULT`` where the logits have NaN
    or +inf, or nothing but -inf.

    Args:
        logits: ``[.., V]``, straight from the model. Processors and filters may exclude tokens; a model may not.
        scores: ``[.., V]``, what they became.
    """
    return torch.where(logits.amax(-1).isfinite(), scores.argmax(-1), FAULT)


def verify_coupled(tokens: Tensor, chosen: Tensor, parents: Tensor, depths: Tensor, ancestors: Tensor) -> Outcome:
    """Accepts the longest matching path.

    Args:
        tokens: ``[B, W]`` int64, node tokens. Column 0 is the root, which counts as accepted; negative values
            (``ABSENT``) never match.
        chosen: ``[B, W]`` int64, the target's token after each node, or ``FAULT``.
        parents: ``[W]`` int64, from the tree shape.
        depths: ``[W]`` int64, likewise.
        ancestors: ``[W, W]`` bool, likewise.

    If siblings differ in token, at most one child of a node matches and the outcome is unique. If
    they do not, the first deepest node is taken; the emitted tokens are the same.
    """
    matches = (tokens == chosen[:, parents]) & (tokens >= 0)
    matches[:, 0] = True
    # A node is accepted iff every node on its path matches.
    failed_above = ((~matches)[:, None, :] & ancestors).any(-1)
    node = (depths * ~failed_above).argmax(-1)
    return Outcome(node, chosen.gather(1, node[:, None]).squeeze(1))
