"""Row plans: what the rows of one kind of forward are, relative to a sequence's length L."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..decoding.trees.shape import TreeShape

BLOCK = 256
"""Main slots an attention block covers. Sums over slots go block by block in one order, so
a longer context adds exact zeros and changes no bit (see ``attention``)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowPlan:
    """R rows of a forward. Hashable by identity: a plan is made once and names a compiled shape."""

    name: str
    offsets: tuple[int, ...]
    """Position of each row is L + offset."""
    limits: tuple[int, ...]
    """Row i attends the main slots below L + limit."""
    in_place: int
    """The first rows, with offsets 0, 1, ..: they are written to main slots L, L+1, .."""
    scratch_start: int = 0
    """The other rows are written to scratch slots from here."""
    scratch_mask: tuple[tuple[bool, ...], ...] | None = None
    """``[R][X]``: which scratch slots each row attends; None: none does."""

    def __post_init__(self) -> None:
        assert self.offsets[: self.in_place] == tuple(range(self.in_place))

    @property
    def rows(self) -> int:
        return len(self.offsets)

    @classmethod
    def sequential(cls, name: str, rows: int) -> RowPlan:
        """Consecutive tokens, each attending all before it: prefill, or one step at a time."""
        steps = tuple(range(rows))
        return cls(name=name, offsets=steps, limits=steps, in_place=rows)

    @classmethod
    def tree(cls, name: str, shape: TreeShape) -> RowPlan:
        """A comb: the chain in place, the leaves beside it in scratch slots 0, 1, ..

        Every row attends exactly the main slots below its own position, and itself: the same
        numbers in the same order as if it had been decoded alone.

        Raises:
            ValueError: a shape that is not a comb with its chain first.
        """
        chain = shape.depth + 1
        if not shape.is_comb or shape.chain != tuple(range(chain)):
            raise ValueError("verification needs a comb: a chain first, then leaves beside it")
        return cls(name=name, offsets=shape.depths, limits=shape.depths, in_place=chain)


def verify_plans(shape: TreeShape, depths: Sequence[int]) -> dict[int, RowPlan]:
    """Verifications by lookahead, ascending, the whole tree last. A chain's beginnings are chains; of other
    combs only the whole can be verified."""
    shorter = [depth for depth in depths if depth < shape.depth] if shape.nodes == shape.depth + 1 else []
    plans = {depth: RowPlan.tree(f"verify {depth}", TreeShape.comb(depth)) for depth in sorted(shorter)}
    return {**plans, shape.depth: RowPlan.tree("verify", shape)}
