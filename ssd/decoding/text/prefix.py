"""Common prefixes of token lists."""

from __future__ import annotations

from collections.abc import Sequence

STRIDE = 64


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the number of tokens that both begin with."""
    length = min(len(one), len(other))
    for start in range(0, length, STRIDE):  # slices compare faster than tokens one by one
        end = min(start + STRIDE, length)
        if one[start:end] != other[start:end]:
            return next(i for i in range(start, end) if one[i] != other[i])
    return length
