"""Widths of a comb: a budget of rows is spent on the candidates most likely to be accepted.

If the target's token is the draft's guess of rank r with probability ``m(r)``, whatever came before, the guess of rank
r > 0 at depth d of a comb is accepted with probability ``m(0)^(d-1) · m(r)``. Taking the most likely ones first is
the greedy allocation by marginal gain. It is optimal, since each probability is below those of the same depth's better
ranks (Sequoia's argument, arXiv 2402.12374, for trees whose leaves are all beside one chain).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

RANKS = (0.70, 0.13, 0.05, 0.024, 0.014, 0.014, 0.008, 0.007, 0.006)
"""Prior ``m(r)``: mean of the embedded pair at temperatures 0 and 1 (``benchmarks/trees.py``)."""


def siblings_within(rows: int, depth: int, ranks: Sequence[float] = RANKS) -> tuple[int, ...]:
    """Returns the number of siblings at each depth of a comb, ``[depth]``.

    Args:
        rows: rows of the comb, root and chain included. Rows beyond the known ranks are left unused.
        depth: K.
        ranks: ``m(r)`` of the known ranks, descending.

    Raises:
        ValueError: root and chain need more rows.
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
