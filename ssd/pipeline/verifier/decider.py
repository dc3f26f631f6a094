"""The decision of a verification: the target's forward over the trees, the tokens it chooses, how far the trees agree
with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...decoding.processors import TreePaths
from ...decoding.trees.combs import noise_at
from ...decoding.trees.shape import TreeShape
from ...decoding.verify.coupled import Outcome, chosen_tokens, verify_coupled
from ...decoding.verify.draft_probs import DraftProbs
from ...models.device import Courier, Written
from ...models.rows import RowPlan
from ...models.runner import ForwardRunner
from ..sampling.slots import SlotSampling
from .judge import Judge


class Decision(NamedTuple):
    logits: Tensor
    """``[B, R, V]`` on the target's device."""
    nodes: list[int]
    """``[B]``, u."""
    bonus: list[int]
    """``[B]``, t, or ``FAULT``."""
    forward_s: float
    """Seconds of the compiled function alone."""


class _Form(NamedTuple):
    """The compiled function for one shape, and its buffers."""

    body: Callable[..., tuple[Tensor, Tensor]]
    tokens: Written
    silence: Tensor


class Decider:
    """Forward, choice and matching as one compiled function: as single operations they would cost a round as much as
    a layer. Processors, filters where they need a sort, and the rules that compare probabilities decide again from its
    logits.

    Args:
        runner: of the target.
        shape: the candidate tree.
        sampling: the sampling parameters of the slots.
        judge: verifies the rows that sample, under ``rejection`` and ``block``; None under ``coupled``.
    """

    def __init__(
        self,
        runner: ForwardRunner,
        shape: TreeShape,
        sampling: SlotSampling,
        judge: Judge | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._runner, self.sampling, self.judge, self._clock = runner, sampling, judge, clock
        device, self._courier = runner.device, Courier(runner.device)
        self._parents, self._depths = shape.parent_index(device), shape.depth_index(device)
        self._ancestors, self._paths = shape.ancestors(device), TreePaths(shape, device)
        self._silence = torch.zeros(runner.batch, shape.depth + 1, runner.vocabulary, device=device)
        self._forms: dict[tuple[RowPlan, int, int], _Form] = {}

    def warm_up(self, plans: Iterable[RowPlan], trees: list[list[int]], slots: Tensor | None = None) -> None:
        """Compile every form that these trees need. Arguments as for ``decide``."""
        for plan in plans:
            for context in self._runner.contexts:
                self.decide(plan, context, self._no_lengths(trees), trees, slots=slots)

    def forward_s(self, plan: RowPlan, trees: list[list[int]], slots: Tensor | None = None) -> float:
        """Seconds of a verification: the shortest of several."""
        lengths, context = self._no_lengths(trees), self._runner.contexts[0]
        return min(self.decide(plan, context, lengths, trees, slots=slots).forward_s for _ in range(5))

    def _no_lengths(self, trees: list[list[int]]) -> Tensor:
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
        drawn_from: Sequence[DraftProbs | None] = (),
    ) -> Decision:
        """Verify trees.

        Args:
            plan: which of the trees' rows are verified: the first ``plan.rows``.
            context: main slots that the forward attends.
            lengths: ``[B]``, L.
            trees: ``[B][W]``.
            noise: ``[B, horizon, V]`` for these lengths; None while nothing samples.
            slots: ``[B]``, the slots that the sampling has selected; None if all.
            drawn_from: ``[B]``, what each tree was drawn from; needed by rules that compare probabilities.
        """
        if (form := self._forms.get((plan, context, len(trees)))) is None:
            form = self._forms[plan, context, len(trees)] = self._form(plan, context, len(trees))
        tokens = form.tokens.write([tree[: plan.rows] for tree in trees])
        began = self._clock()
        self._runner.announce(plan, tokens, lengths, context)
        given = form.silence if noise is None else noise
        logits, decided = form.body(tokens, lengths, self.sampling.packed, given, slots)
        (decided,) = self._courier.fetch(decided)
        forward_s = self._clock() - began
        judged = self.judge is not None and noise is not None and plan.rows > 1
        if judged or not self.sampling.plain:
            outcome = self._decide_again(plan, tokens, lengths, trees, logits, noise, drawn_from if judged else None)
            decided = torch.stack(outcome)
        nodes, bonus = decided.tolist()
        return Decision(logits, nodes, bonus, forward_s)

    def _decide_again(
        self,
        plan: RowPlan,
        tokens: Tensor,
        lengths: Tensor,
        trees: list[list[int]],
        logits: Tensor,
        noise: Tensor | None,
        drawn_from: Sequence[DraftProbs | None] | None,
    ) -> Outcome:
        """The outcomes ``[B]`` on the host with processors, filters and the rule. ``drawn_from``: None unless the rule
        applies. Other arguments as for ``decide``; ``tokens`` are the plan's rows of ``trees``."""
        paths, ahead = None, self._depths[: plan.rows].expand(len(tokens), -1)
        if self.sampling.processors.active:
            paths = self._paths.of(torch.tensor(trees, device=tokens.device))[:, : plan.rows]
        raw = logits
        logits, scores = self.sampling.exact(raw, noise, ahead, paths)
        chosen = chosen_tokens(raw, scores)
        matched = Outcome(*self._courier.fetch(*self._verify(tokens, chosen)))
        if self.judge is None or drawn_from is None or noise is None:
            return matched
        draft, params, row_noise = self.judge.stacked(drawn_from), self.sampling.params, noise_at(noise, ahead)
        return self.judge.decide(matched, chosen.cpu(), tokens.cpu(), logits, lengths, row_noise, params, draft)

    def _form(self, plan: RowPlan, context: int, count: int) -> _Form:
        runner, verify, sampling = self._runner, self._verify, self.sampling
        ahead = self._depths[: plan.rows].expand(count, -1)

        def decide(
            tokens: Tensor, lengths: Tensor, packed: Tensor, noise: Tensor, slots: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            # A draft may send anything. Ids outside the vocabulary are clamped for the forward and never accepted.
            logits = runner.logits(plan, tokens.clamp(0, runner.vocabulary - 1), lengths, context, slots=slots)
            decided = verify(tokens, chosen_tokens(logits, sampling.score(logits, noise, ahead, packed)))
            return logits, torch.stack([*decided])  # a named tuple in the graph would keep it out of torch's cache

        written = Written(count, plan.rows, device=runner.device)
        return _Form(runner.compiled(decide), written, self._silence[:count])

    def _verify(self, tokens: Tensor, chosen: Tensor) -> Outcome:
        rows = tokens.shape[1]
        return verify_coupled(tokens, chosen, self._parents[:rows], self._depths[:rows], self._ancestors[:rows, :rows])
