"""The draft whose candidates a function proposes (``models.drafts.proposer``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...decoding.text.ngram import NgramIndex
from ...decoding.trees.shape import ABSENT, TreeShape
from ...decoding.verify.draft_probs import DraftProbs
from ...models.drafts.proposer import Proposer
from ..round.frames import OutcomeFrame, ProbsLayout, RowState, SpeculationSet
from ..sampling.walk import never
from ..transport.messages import Admit
from .sequence import ProposedRow
from .worker import DraftedTrees, DraftWorker


class ProposingDraft:
    """A draft worker without a model, with the methods of ``DraftWorker`` that rounds need.

    It prepares for no outcomes: every request is drafted for when it waits.

    Args:
        proposer: makes candidates.
        shape: the candidate tree.
        batch: B, the slots.
        probs: how distributions travel, under rules that need them. Candidates are named, not drawn.
        budget: N, the branches of a speculation set.
    """

    def __init__(self, proposer: Proposer, shape: TreeShape, *, batch: int, budget: int, probs: ProbsLayout | None):
        self._proposer, self._shape, self._probs = proposer, shape, probs
        self._rows: list[ProposedRow | None] = [None] * batch
        self._absent = [ABSENT] * (shape.nodes - 1)
        self._lookahead = shape.depth
        outcomes = np.full((batch, budget), ABSENT)
        trees = np.full((batch, budget, shape.nodes - 1), ABSENT)
        self._nothing = SpeculationSet(nodes=outcomes, guesses=outcomes, trees=trees, draft=self._undrawn(budget))

    def admit(self, message: Admit) -> None:
        """Starts a sequence in its slot."""
        self._rows[message.slot] = ProposedRow(
            tokens=list(message.tokens),
            tree=list(self._absent),
            forecasts=message.forecasts,
            ngrams=NgramIndex(message.tokens),
        )

    def speculate(self, bell: Callable[[], bool] = never) -> SpeculationSet:
        """Returns a set without branches."""
        return self._nothing

    def commit(self, frame: OutcomeFrame, speculation: SpeculationSet) -> list[bool]:
        """Applies an outcome. Returns the rows ``[B]`` that have candidates: n-grams, where missed rows take them."""
        self._lookahead, served = frame.lookahead or self._shape.depth, [False] * len(self._rows)
        for slot, state in enumerate(frame.states):
            row = self._rows[slot]
            if row is None or state == RowState.PREFILL:
                continue
            if state != RowState.ACTIVE:
                self._rows[slot] = None
                continue
            certain = [*(row.tree[node - 1] for node in self._shape.path(frame.nodes[slot])), frame.bonus[slot]]
            row.tokens.extend(certain)
            row.ngrams.extend(certain)
            taken = row.ngrams.propose(self._shape.depth) if frame.ngram and row.forecasts else []
            row.tree = [*taken, *self._absent[len(taken) :]]
            served[slot] = bool(taken)
        return served

    def waiting(self, states: Sequence[int], served: Sequence[bool], *, jit: bool) -> list[bool]:
        """As ``DraftWorker.waiting``."""
        return [
            state == RowState.ACTIVE and not has and row is not None and (jit or not row.forecasts)
            for state, has, row in zip(states, served, self._rows, strict=True)
        ]

    def draft_now(self, missed: Sequence[bool]) -> DraftedTrees:
        """Asks for the candidates of the rows ``missed [B]``."""
        trees = [self._absent] * len(self._rows)
        for slot, row in enumerate(self._rows):
            if missed[slot] and row is not None:
                found = self._proposer.propose(row.tokens, self._lookahead)
                trees[slot] = row.tree = [*found, *self._absent[len(found) :]]
        return DraftedTrees(trees=trees, draft=self._undrawn())

    def _undrawn(self, *branches: int) -> DraftProbs | None:
        if self._probs is None:
            return None
        return DraftProbs.nothing(len(self._rows), *branches, self._probs.inner, self._probs.size)


Draft = DraftWorker | ProposingDraft
"""What a draft process runs."""
