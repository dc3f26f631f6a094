"""Row plans: the rows of one kind of forward, relative to a sequence's length L."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..decoding.trees.shape import TreeShape

BLOCK = 256
"""Main slots of an attention block. Sums over slots run block by block in a fixed order, so
a longer context adds exact zeros and changes no bit (see ``attention``)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowPlan:
    """The R rows of a forward. Hashed by identity: a plan is made once, and stands for a compiled shape."""

    name: str
    offsets: tuple[int, ...]
    """Position of each row is L + offset."""
    limits: tuple[int, ...]
    """Row i attends the main slots below L + limit."""
    in_place: int
    """Number of first rows, with offsets 0, 1, ...: they are written to main slots L, L + 1, ..."""
    scratch_start: int = 0
    """First scratch slot of the other rows."""
    scratch_mask: tuple[tuple[bool, ...], ...] | None = None
    """``[R][X]``: the scratch slots each row attends; None: no row attends any."""

    def __post_init__(self) -> None:
        assert self.offsets[: self.in_place] == tuple(range(self.in_place))

    @property
    def rows(self) -> int:
        return len(self.offsets)

    @classmethod
    def sequential(cls, name: str, rows: int) -> RowPlan:
        """Returns the plan of consecutive tokens, each attending all tokens before it: prefill, or plain steps."""
        steps = tuple(range(rows))
        return cls(name=name, offsets=steps, limits=steps, in_place=rows)

    @classmethod
    def tree(cls, name: str, shape: TreeShape) -> RowPlan:
        """Returns the plan of a comb: the chain in place, the leaves beside it in scratch slots 0, 1, ...

        Every row attends exactly the main slots below its own position, and itself: the same
        sums in the same order as if it were decoded alone.

        Raises:
            ValueError: the shape is not a comb with its chain first.
        """
        chain = shape.depth + 1
        if not shape.is_comb or shape.chain != tuple(range(chain)):
            raise ValueError("verification needs a comb: a chain first, then leaves beside it")
        return cls(name=name, offsets=shape.depths, limits=shape.depths, in_place=chain)


class Layout(NamedTuple):
    """A ``RowPlan`` as tensors: one for all sequences, or one for each (leading B)."""

    offsets: Tensor
    """``[R]`` or ``[B, R]``"""
    limits: Tensor
    """``[R]`` or ``[B, R]``"""
    scratch_slots: Tensor
    """``[R - in_place]``"""
    mask: Tensor | None
    """``[R, X]`` or ``[B, R, X]``"""

    @classmethod
    def of(cls, plan: RowPlan, device: torch.device) -> Layout:
        spare = plan.rows - plan.in_place
        return cls(
            torch.tensor(plan.offsets, device=device),
            torch.tensor(plan.limits, device=device),
            torch.arange(plan.scratch_start, plan.scratch_start + spare, device=device),
            None if plan.scratch_mask is None else torch.tensor(plan.scratch_mask, device=device),
        )


def verify_plans(shape: TreeShape, depths: Sequence[int]) -> dict[int, RowPlan]:
    """Returns the verifications by lookahead, ascending, the whole tree last.

    Args:
        shape: the whole tree.
        depths: other lookaheads wanted. Only a chain has shorter ones; other combs are verified whole.
    """
    shorter = [depth for depth in depths if depth < shape.depth] if shape.nodes == shape.depth + 1 else []
    plans = {depth: RowPlan.tree(f"verify {depth}", TreeShape.comb(depth)) for depth in sorted(shorter)}
    return {**plans, shape.depth: RowPlan.tree("verify", shape)}
