"""Where the siblings of a comb stand: a budget of rows spent on the likeliest candidates.

If the target's token is the draft's guess of rank r with chance ``m(r)``, whatever came before, the guess of rank
r > 0 at depth d of a comb is accepted with chance ``m(0)^(d-1) · m(r)``. Taking the likeliest ones first is the greedy
allocation by marginal gain, optimal since each chance is below those of the same depth's better ranks (Sequoia's
argument, arXiv 2402.12374, for trees whose leaves only hang beside one chain).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

RANKS = (0.70, 0.13, 0.05, 0.024, 0.014, 0.014, 0.008, 0.007, 0.006)
"""Prior ``m(r)``: means of the embedded pair at temperatures 0 and 1 (``benchmarks/trees.py``)."""


def siblings_within(rows: int, depth: int, ranks: Sequence[float] = RANKS) -> tuple[int, ...]:
    """How many siblings each depth of a comb gets, ``[depth]``: at most ``rows`` rows in all, root and chain included.

    Raises:
        ValueError: fewer rows than root and chain need.
    """
    left = rows - 1 - depth
    if left < 0:
        raise ValueError(f"a chain of {depth} needs {depth + 1} rows, not {rows}")
    counts = [0] * depth
    heap = [(-(ranks[0] ** above) * ranks[1], above) for above in range(depth)]
    while left and heap:
        _, above = heapq.heappop(heap)
        counts[above] += 1
        left -= 1
        if (rank := counts[above] + 1) < len(ranks):
            heapq.heappush(heap, (-(ranks[0] ** above) * ranks[rank], above))
    return tuple(counts)
