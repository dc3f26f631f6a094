"""What a verification decides: the target's forward over the trees, the tokens it chooses, how far they agree."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ...decoding.processors import TreePaths
from ...decoding.sampling import scores
from ...decoding.trees.shape import TreeShape
from ...decoding.verify.coupled import Outcome, verify_coupled
from ...models.cuda.device import Courier, Written
from ...models.rows import RowPlan
from ...models.runner import ForwardRunner
from ..sampling.slots import SlotSampling
from .judge import Judge


class Decision(NamedTuple):
    logits: Tensor
    """``[B, R, V]``"""
    nodes: list[int]
    """``[B]``, u."""
    bonus: list[int]
    """``[B]``, t."""
    forward_s: float
    """Of the compiled function alone."""


class _Form(NamedTuple):
    """Of one shape."""

    body: Callable[..., tuple[Tensor, Tensor]]
    tokens: Written
    silence: Tensor


class Decider:
    """Forward, choice and verification as one compiled function: a round's many small operations would cost as
    much as a layer. Processors, and filters where they sort, choose anew from its logits.

    Args: runner: of the target. shape: the candidate tree. chooser: what the rows' requests ask for.
    """

    def __init__(
        self,
        runner: ForwardRunner,
        shape: TreeShape,
        chooser: SlotSampling,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._runner, self.chooser, self._clock = runner, chooser, clock
        self.judge: Judge | None = None
        """Under ``rejection`` and ``block``: verifies the rows that sample."""
        device, self._courier = runner.device, Courier(runner.device)
        self._parents, self._depths = shape.parent_index(device), shape.depth_index(device)
        self._ancestors, self._paths = shape.ancestors(device), TreePaths(shape, device)
        self._silence = torch.zeros(runner.batch, shape.depth + 1, runner.vocabulary, device=device)
        self._forms: dict[tuple[RowPlan, int, int], _Form] = {}

    def warm_up(self, plans: Iterable[RowPlan], trees: list[list[int]], slots: Tensor | None = None) -> None:
        """Compile every form a round needs: of all slots, or of some."""
        for plan in plans:
            for context in self._runner.contexts:
                self.decide(plan, context, self._nothing(trees), trees, slots=slots)

    def forward_s(self, plan: RowPlan, trees: list[list[int]], slots: Tensor | None = None) -> float:
        """Seconds of a verification, at its shortest."""
        lengths, context = self._nothing(trees), self._runner.contexts[0]
        return min(self.decide(plan, context, lengths, trees, slots=slots).forward_s for _ in range(5))

    def _nothing(self, trees: list[list[int]]) -> Tensor:
        return torch.zeros(len(trees), dtype=torch.int64, device=self._runner.device)

    @torch.no_grad()
    def decide(
        self,
        plan: RowPlan,
        context: int,
        lengths: Tensor,
        trees: list[list[int]],
        noise: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Decision:
        """The outcomes of the trees ``[B][W]``, of which ``plan`` verifies the first rows, above L ``[B]``.
        ``noise``: of these lengths; None while nothing samples. ``slots`` ``[B]``: which the chooser has selected, if
        not all."""
        if (form := self._forms.get((plan, context, len(trees)))) is None:
            form = self._forms[plan, context, len(trees)] = self._form(plan, context, len(trees))
        tokens = form.tokens.write([tree[: plan.rows] for tree in trees])
        began = self._clock()
        quiet = form.silence if noise is None else noise
        self._runner.announce(plan, tokens, lengths, context)
        logits, decided = form.body(tokens, lengths, self.chooser.packed, quiet, slots)
        (decided,) = self._courier.fetch(decided)
        forward_s = self._clock() - began
        judge = self.judge if noise is not None and plan.rows > 1 else None
        if judge is not None or not self.chooser.plain:
            decided = torch.stack(self._anew(plan, tokens, lengths, trees, logits, noise, judge))
        nodes, bonus = decided.tolist()
        return Decision(logits, nodes, bonus, forward_s)

    def _anew(
        self,
        plan: RowPlan,
        tokens: Tensor,
        lengths: Tensor,
        trees: list[list[int]],
        logits: Tensor,
        noise: Tensor | None,
        judge: Judge | None,
    ) -> Outcome:
        """The outcome with processors, filters and the rule."""
        if self.chooser.processors.active:
            paths = self._paths.of(torch.tensor(trees, device=tokens.device))
            logits = self.chooser.processed(logits, paths[:, : plan.rows])
        ahead = None if noise is None else noise[:, self._depths[: plan.rows]]
        chosen = scores(logits, self.chooser.params, ahead).argmax(-1)
        matched = Outcome(*self._courier.fetch(*self._verify(tokens, chosen)))
        if judge is None:
            return matched
        assert ahead is not None
        return judge.decide(matched, chosen.cpu(), tokens.cpu(), logits, lengths, ahead, self.chooser.params)

    def _form(self, plan: RowPlan, context: int, count: int) -> _Form:
        runner, verify, chooser = self._runner, self._verify, self.chooser
        ahead = self._depths[: plan.rows].expand(count, -1)

        def decide(
            tokens: Tensor, lengths: Tensor, packed: Tensor, noise: Tensor, slots: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            # A draft may send anything: what is no token is fed as some token, and never accepted.
            logits = runner.logits(plan, tokens.clamp(0, runner.vocabulary - 1), lengths, context, slots=slots)
            decided = verify(tokens, chooser.score(logits, noise, ahead, packed).argmax(-1))
            return logits, torch.stack([*decided])  # a named tuple in the graph would keep it out of torch's cache

        written = Written(count, plan.rows, device=runner.device)
        return _Form(runner.compiled(decide), written, self._silence[:count])

    def _verify(self, tokens: Tensor, chosen: Tensor) -> Outcome:
        rows = tokens.shape[1]
        return verify_coupled(tokens, chosen, self._parents[:rows], self._depths[:rows], self._ancestors[:rows, :rows])
