"""Whether a forward may have fewer rows without changing a bit.

Where sums run in one order however many rows there are (our operators on CPUs, ``models/csrc``), a row's logits and
keys are the same bits in a plain forward as in a verification, and strict numerics need no padding. What the
compiler makes of the operations in between is not ours: so this is tried on the very functions that rounds call, with
every engine, before it is relied on. Which path a row takes through a kernel depends on shapes, not on
values; another order of summation shows in the last bits of some of the thousands of numbers compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.rows import RowPlan
from ..models.runner import ForwardRunner
from .decider import Decider


def interchangeable(runner: ForwardRunner, decider: Decider, plans: list[RowPlan]) -> bool:
    """Whether rows have the same bits in forwards of all ``plans``: whole trees, and their beginnings, the first a
    single row. The slots' contents are lost."""
    if not runner.ordered_sums:
        return False
    one, *wider = plans
    random = torch.Generator().manual_seed(0)
    middle = runner.cache.capacity // 2
    for plan in wider:
        for length in (0, plan.rows, middle):
            tokens = torch.randint(runner.vocabulary, (runner.batch, plan.rows), generator=random)
            if not _same(runner, decider, one, plan, tokens, length):
                return False
    return True


def _same(runner: ForwardRunner, decider: Decider, one: RowPlan, plan: RowPlan, tokens: Tensor, length: int) -> bool:
    def logits(rows: RowPlan, fed: Tensor, at: int) -> Tensor:
        lengths = torch.full((runner.batch,), at, dtype=torch.int64)
        return decider.decide(rows, runner.contexts[0], lengths, fed.tolist()).logits.clone()

    def states() -> list[Tensor]:
        return [main[:, :, length : length + plan.in_place].clone() for part in runner.cache.main for main in part]

    whole, kept = logits(plan, tokens, length), states()
    # The chain first: a leaf, fed in place, takes the place of the chain's node beside it. Deep ones before others.
    leaves = sorted(range(plan.in_place, plan.rows), key=lambda row: -plan.offsets[row])
    for row in [*range(plan.in_place), *leaves]:
        alone = logits(one, tokens[:, row : row + 1], length + plan.offsets[row])
        if not torch.equal(alone[:, 0], whole[:, row]):
            return False
        if row == plan.in_place - 1 and not _equal(states(), kept):
            return False
    return True


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))
