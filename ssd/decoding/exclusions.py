"""Exclusions of tokens, in place: bad words, end ids, and whatever a grammar does not allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .trees.shape import ABSENT

if TYPE_CHECKING:
    from .processors import Constraint

EXCLUDED = float("-inf")


class BadWords:
    """N bad words of two tokens or more; their prefixes have at most T tokens."""

    def __init__(self, words: Sequence[tuple[int, ...]], device: torch.device | str):
        self.length = max(len(word) for word in words) - 1
        padded = [[ABSENT] * (self.length - len(word) + 1) + list(word[:-1]) for word in words]
        self.prefixes = torch.tensor(padded, device=device)  # [N, T], padded on the left
        self.last = torch.tensor([word[-1] for word in words], device=device)  # [N]

    def exclude(self, logits: Tensor, tails: Tensor) -> None:
        """Excludes the last tokens of words whose prefix is complete, in place.

        Args:
            logits: ``[R, V]``.
            tails: ``[R, T]``, the last tokens before each row's choice.
        """
        complete = ((tails[:, None] == self.prefixes) | (self.prefixes == ABSENT)).all(-1)
        # Added, not assigned: two words may end in the same token.
        logits.index_add_(1, self.last, torch.zeros_like(complete, dtype=logits.dtype).masked_fill(complete, EXCLUDED))


def exclude(logits: Tensor, tokens: Tensor, where: Tensor) -> None:
    """Excludes tokens in some rows.

    Args:
        logits: ``[R, V]``, changed in place.
        tokens: ``[E]`` int64, all different.
        where: ``[R]`` bool, the rows.
    """
    logits.index_copy_(1, tokens, logits[:, tokens].masked_fill(where[:, None], EXCLUDED))


def constrain(logits: Tensor, constraint: Constraint, paths: Tensor) -> None:
    """Excludes what a grammar does not allow. Waits for the device.

    Args:
        logits: ``[R, V]`` with all other exclusions, changed in place.
        constraint: the grammar, positioned after the committed tokens.
        paths: ``[R, D]`` int64, each row's tokens after those.
    """
    rows = [[token for token in path if token >= 0] for path in paths.tolist()]
    allowed = constraint.allowed(rows).to(logits.device)
    logits.masked_fill_(~allowed, EXCLUDED)
    stuck = logits.amax(-1) == EXCLUDED
    # One finite logit, so that the row has a distribution. A row in which all tokens are allowed is never stuck.
    wrong = torch.where(stuck, allowed.long().argmin(-1), -1)
    logits.masked_fill_(wrong[:, None] == torch.arange(logits.shape[1], device=logits.device), 0.0)


def tails(output: Sequence[int], length: int, paths: Tensor, present: Tensor) -> Tensor:
    """Returns the last ``length`` tokens before each row's choice: ``[R, length]``, padded with ``ABSENT`` on the left.

    Args:
        output: the end of the committed output.
        length: at least ``len(output)``.
        paths: ``[R, D]``.
        present: ``[R, D]`` bool, where a path has a token.
    """
    committed = torch.tensor([ABSENT] * (length - len(output)) + list(output), dtype=torch.int64)
    both = torch.cat([committed.to(paths.device, non_blocking=True).expand(len(paths), -1), paths], dim=1)
    depth = present.sum(-1, keepdim=True)
    back = torch.arange(length, 0, -1, device=paths.device)  # how far before the choice
    width = both.shape[1]
    # A path shorter than D leaves a gap after the committed tokens.
    gap = torch.where(back > depth, paths.shape[1] - depth, 0)
    return both.gather(1, width - back - gap)
