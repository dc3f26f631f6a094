"""Averages that forget."""

from __future__ import annotations


class DecayingRatio:
    """Ratio of two exponentially decaying sums: a mean where the lower one counts, a rate where it measures.

    Args:
        memory: times of fading after which an observation has lost 1 - 1/e of its weight; at least 1.
        top: the upper sum to start with.
        bottom: the lower sum to start with; a start at ``(w · guess, w)`` is a prior worth w observations.
    """

    __slots__ = ("_keep", "bottom", "top")

    def __init__(self, memory: float, *, top: float = 0.0, bottom: float = 0.0):
        self._keep = 1 - 1 / memory
        self.top, self.bottom = top, bottom

    def fade(self) -> None:
        """Lets all observations so far lose weight."""
        self.top *= self._keep
        self.bottom *= self._keep

    def add(self, top: float, bottom: float = 1.0) -> None:
        """Adds an observation without fading: for several that are equally old."""
        self.top += top
        self.bottom += bottom

    def observe(self, top: float, bottom: float = 1.0) -> None:
        """Fades, then adds an observation."""
        self.fade()
        self.add(top, bottom)

    @property
    def value(self) -> float | None:
        """The ratio; None before anything was observed."""
        return self.top / self.bottom if self.bottom else None

    def towards(self, guess: float, weight: float) -> float:
        """Returns the ratio, drawn towards ``guess`` as if that had been observed ``weight`` times."""
        return (self.top + weight * guess) / (self.bottom + weight)
