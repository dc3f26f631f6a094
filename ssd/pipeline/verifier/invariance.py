"""Whether a forward may have fewer rows, or fewer slots, without changing a bit.

Our CPU operators (``models/cpu/csrc``) sum in one order however many rows there are. A row's logits and keys then have
the same bits in a plain forward as in a verification, alone and beside other rows, and strict numerics need no padding.
The compiler decides about the operations in between, so every engine tries this at start, on the functions that rounds
call, before it relies on it. The path of a row through a kernel depends on shapes, not on values: another order of
summation shows in the last bits of some of the thousands of numbers compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.rows import RowPlan
from ...models.runner import ForwardRunner
from ..sampling.selection import Selection, Selector
from .decider import Decider

LENGTH = 96
"""Main slots that the rows of a trial attend. Their contents are random."""


def interchangeable(runner: ForwardRunner, decider: Decider, plans: list[RowPlan], selector: Selector) -> bool:
    """Whether a row has the same bits in all forwards that rounds may use. The slots' contents are lost.

    Args:
        plans: a single row, then trees of every lookahead.
        selector: chooses among the numbers of slots.
    """
    if not runner.ordered_sums:
        return False
    one, *wider = plans
    random, length = torch.Generator().manual_seed(0), min(runner.cache.capacity // 2, LENGTH)
    before = [main[:, :, :length] for part in runner.cache.main for main in part]
    for states in before:
        states.copy_(torch.randn(states.shape, generator=random))
    found = []
    for plan in wider:
        tokens = torch.randint(runner.vocabulary, (runner.batch, plan.rows), generator=random)
        found.append(_same(_Trial(runner, decider, tokens, length), selector, one, plan))
    for states in before:
        states.zero_()
    return all(found)


class _Trial:
    """The same tokens after the same length, in several forwards."""

    def __init__(self, runner: ForwardRunner, decider: Decider, tokens: Tensor, length: int):
        self._runner, self._decider, self._tokens, self._length = runner, decider, tokens, length

    def logits(self, plan: RowPlan, selected: Selection, first: int = 0, ahead: int = 0) -> Tensor:
        """Logits ``[B, R, V]`` of the plan's R tokens from ``first`` on, at ``ahead`` positions after the length."""
        self._decider.sampling.select(selected)
        lengths = torch.full((selected.count,), self._length + ahead, dtype=torch.int64)
        fed = self._tokens[list(selected.slots), first : first + plan.rows].tolist()
        return self._decider.decide(plan, self._runner.contexts[0], lengths, fed, slots=selected.index).logits.clone()

    def states(self, selected: Selection, count: int) -> list[Tensor]:
        """Keys and values of the first ``count`` tokens in all layers."""
        slots, places = list(selected.slots), slice(self._length, self._length + count)
        return [main[slots, :, places] for part in self._runner.cache.main for main in part]


def _same(trial: _Trial, selector: Selector, one: RowPlan, plan: RowPlan) -> bool:
    reference, kept = trial.logits(plan, selector.all), trial.states(selector.all, plan.in_place)
    # The chain first: a leaf that is fed in place overwrites the chain's node beside it. Deep leaves before others.
    leaves = sorted(range(plan.in_place, plan.rows), key=lambda row: -plan.offsets[row])
    for count in selector.counts:
        selected = selector.of(range(selector.all.count - count, selector.all.count))
        slots = list(selected.slots)
        if not torch.equal(trial.logits(plan, selected), reference[slots]):
            return False
        for row in [*range(plan.in_place), *leaves]:
            alone = trial.logits(one, selected, row, plan.offsets[row])
            if not torch.equal(alone[:, 0], reference[slots, row]):
                return False
            if row == plan.in_place - 1:
                own = zip(trial.states(selected, plan.in_place), kept, strict=True)
                if not all(torch.equal(some, every[slots]) for some, every in own):
                    return False
    return True
