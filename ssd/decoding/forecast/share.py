"""A forecast divided among several drafts: each prepares its share of the outcomes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import Forecast


class ForecastShare(Forecast):
    """Every D-th outcome of ``whole``, starting with this rank's, so that all shares have about the same value.

    Every rank computes the whole forecast from the same scores and noise, so no message is needed. If two ranks
    differ at a near tie, an outcome is prepared twice or not at all: that can cost a miss, never change a token.

    Args:
        whole: the forecast with D times a rank's budget; it does not learn.
        rank: 0 <= rank < D.
        ranks: D.
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
