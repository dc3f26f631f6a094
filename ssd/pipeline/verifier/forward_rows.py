"""Which slots and which rows a verification's forward has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ...decoding.trees.shape import ABSENT
from ...models.device import Written
from ...models.rows import RowPlan, verify_plans
from ...models.runner import ForwardRunner
from ..sampling.selection import Selection, Selector
from ..sampling.slots import SlotSampling
from .decider import Decider
from .invariance import interchangeable
from .options import VerifierOptions
from .slots import Slots


class Selected(NamedTuple):
    """Slots of a forward."""

    slots: Selection
    known: list[int]
    """``[B]``, L of each."""
    lengths: Tensor
    """The same on the device, int64."""


class ForwardCost(NamedTuple):
    """What forwards of some number of slots take, where plain rounds are not padded."""

    slots: int
    plain_s: float
    verify_s: dict[int, float]
    """By lookahead."""


class ForwardRows:
    """Chooses the smallest forward whose rows have the same bits as in any other.

    Args:
        options: how the verifier decodes.
        sampling, decider: the verifier's.
        self_draft: whether there is a draft that runs on the same slots, always all of them.
    """

    def __init__(
        self,
        runner: ForwardRunner,
        options: VerifierOptions,
        sampling: SlotSampling,
        decider: Decider,
        *,
        self_draft: bool,
    ):
        self._runner, self._sampling, self._decider = runner, sampling, decider
        self.padded = options.strict
        """Whether all decode forwards have the same number of rows."""
        self._always_all = self_draft or decider.judge is not None
        self._absent = [ABSENT] * (options.shape.nodes - 1)
        self._plans = verify_plans(options.shape, options.lookaheads)
        self._whole, self._one = self._plans[options.shape.depth], RowPlan.sequential("one", 1)
        batch = runner.batch
        self._selector = Selector(batch, (batch,) if options.strict else runner.counts, runner.device)
        self._lengths = {count: Written(count, device=runner.device) for count in (*runner.counts, batch)}

    def warm_up(self) -> Iterator[ForwardCost]:
        """Find out which forwards are interchangeable, compile every form that a round needs, and measure what they
        cost where they differ."""
        runner, decider, plans = self._runner, self._decider, [self._one, *self._plans.values()]
        if self.padded:
            selector = Selector(runner.batch, runner.counts, runner.device)
            self.padded = not interchangeable(runner, decider, plans, selector)
            self._selector = self._selector if self.padded else selector
        if not runner.fuses:
            return
        self._sampling.warm_up(self._selector.counts)
        for count in self._selector.counts:
            selected = self._selector.first(count)
            self._sampling.select(selected)
            trees = [[ABSENT, *self._absent]] * count
            decider.warm_up([self._whole] if self.padded else plans, trees, selected.index)
            if not self.padded:
                verify_s = {
                    depth: decider.forward_s(plan, trees, selected.index) for depth, plan in self._plans.items()
                }
                yield ForwardCost(count, decider.forward_s(self._one, trees, selected.index), verify_s)

    def select(self, slots: Slots) -> Selected:
        """Select the slots of the next forward, in the sampling too. Empty slots may be among them: their output is
        ignored, and their keys are written behind what the slot holds."""
        everything = self._always_all or self._sampling.processors.active
        selected = self._selector.all if everything else self._selector.of(slots.used)
        self._sampling.select(selected)
        known = [slots.length(slot) for slot in selected.slots]
        return Selected(selected, known, self._lengths[selected.count].write(known))

    def plan(self, slots: Slots, trees: list[list[int]]) -> RowPlan:
        """The rows that verify ``trees [B][W]`` of all slots: as few as the candidates need, where that changes no
        bit."""
        plain = all(tree[1:] == self._absent for tree in trees)
        if plain and (not self.padded or all(row is None or row.method == "none_fast" for row in slots.rows)):
            return self._one
        if self.padded or self._decider.judge is not None or len(self._plans) == 1:
            return self._whole
        deepest = max(len(self._absent) - tree[1:].count(ABSENT) for tree in trees)  # chains, which have no holes
        return next((plan for depth, plan in self._plans.items() if depth >= deepest), self._whole)
