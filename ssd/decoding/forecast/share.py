"""A forecast made by several drafts: each prepares for its share of what all together would."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import Forecast


class ForecastShare(Forecast):
    """Every D-th outcome of ``whole``, from the one of this rank on, so that all shares are worth about the same.

    Every rank computes the whole forecast from the same scores and the same noise, so nothing is sent for it.
    Should two ranks differ at a near tie, an outcome is prepared twice or not at all: a miss, never a token.

    Args: whole: of D times the budget of a rank; it learns nothing. rank: of D = ``ranks``.
    """

    def __init__(self, whole: Forecast, rank: int, ranks: int):
        self._whole, self._rank, self._ranks = whole, rank, ranks
        self.budget = whole.budget // ranks
        self.fan_out, self.by_row = whole.fan_out, whole.by_row

    def outcomes(self, scores: Tensor, tokens: Tensor, quiet: Tensor | None = None) -> tuple[Tensor, Tensor]:
        nodes, guesses = self._whole.outcomes(scores, tokens, quiet)
        mine = slice(self._rank, None, self._ranks)
        return nodes[:, mine].contiguous(), guesses[:, mine].contiguous()

    def admit(self, slot: int, temperature: float) -> None:
        self._whole.admit(slot, temperature)

    def prepare(self, trees: Sequence[Sequence[int]]) -> None:
        self._whole.prepare(trees)
