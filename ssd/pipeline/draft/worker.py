"""The draft worker: knows every sequence, and prepares speculations while the verifier checks. It only decides;
``runtime.draft_loop`` moves the frames."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
import torch

from ...decoding.text.ngram import NgramIndex
from ...decoding.text.prefix import common_prefix
from ...decoding.trees.shape import ABSENT
from ...decoding.verify.draft_probs import DraftProbs
from ...models.device import Courier, Written
from ..round.frames import OutcomeFrame, RowState, SpeculationSet
from ..round.lookup import lookup
from ..sampling.selection import Selection, Selector
from ..sampling.walk import never
from ..transport.messages import Admit
from .drafting import Drafting
from .executors import DraftBatch, DraftModel
from .sequence import DraftRow


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftOptions:
    """How a draft works."""

    lookaheads: tuple[int, ...]
    """Depths that the verifier may ask for, ascending; the last is that of the candidate tree."""
    lookahead: int
    """K until the verifier asks for another one."""
    ngram: bool = False
    """Whether missed rows may take n-grams; the verifier says when."""
    prefix_caching: bool = True
    """Whether a sequence takes over the keys that other slots hold of it."""
    anytime: bool = False
    """Whether a tree ends when the verifier waits for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftedTrees:
    """Trees drafted while the verifier waits."""

    trees: list[list[int]]
    """``[B][W - 1]``; ``ABSENT`` in rows that decode without candidates."""
    draft: DraftProbs | None
    """``[B, I, m]``, the distributions they were drawn from; under rules that need it."""


class DraftWorker:
    """Prepares a speculation set per round for the trees under verification.

    Args:
        model: the draft, over the same slots as the verifier's.
        options: how it works.
    """

    def __init__(self, model: DraftModel, options: DraftOptions):
        self.runner, self.shape, self.forecast = model.runner, model.shape, model.forecast
        self.sampling, self.copying, self.options = model.sampling, model.copying, options
        batch, device, runner, nodes = model.runner.batch, model.runner.device, model.runner, model.shape.nodes
        self.rows: list[DraftRow | None] = [None] * batch
        self._left: list[list[int]] = [[] for _ in range(batch)]
        """Tokens whose keys and values the slot's last sequence left behind."""
        self._admitted, self._prefilled, self._lookahead = 0, False, options.lookahead
        self._absent = [ABSENT] * (nodes - 1)
        self.trees = [[ABSENT, *self._absent] for _ in range(batch)]
        """Tokens ``[B][W]`` of the trees under verification."""
        # A learning forecast looks at all slots together. And a compiled tree takes a minute and a half for each
        # count, and again for each lookahead.
        several = self.forecast.by_row and (not runner.compile or len(options.lookaheads) < 2)
        counts = runner.counts if several else (batch,)
        self._selector = Selector(batch, counts, device)
        self._written = {
            (count, width): Written(count, width, device=device) for count in counts for width in (1, nodes)
        }
        self._lengths_written = {count: Written(count, device=device) for count in counts}
        self._courier = Courier(device)
        self.drafting = Drafting(model, lookaheads=options.lookaheads, anytime=options.anytime)
        self._sampler = model.sampler
        self._in_glue: set[int] = set()
        """Slots whose trees were in this round's glue forward."""

    def warm_up(self) -> None:
        """Compiles every form that a round needs."""
        self.drafting.warm_up(self._selector)
        self.sampling.warm_up(self._selector.counts)

    def admit(self, message: Admit) -> None:
        """Starts a sequence in its slot, or starts it again with other parameters."""
        slot, params = message.slot, message.params
        self.release(slot)
        tokens = list(message.tokens[:-1])
        # A sequence that comes back finds its keys where they were, those of generated tokens too.
        row = self.rows[slot] = DraftRow(
            tokens=tokens,
            cached=common_prefix(tokens, self._left[slot]),
            forecasts=message.forecasts,
            number=self._admitted,
            ngrams=NgramIndex(message.tokens) if self.options.ngram else None,
            request=message,
        )
        self._take_over(slot, row)
        self._admitted += 1
        self._in_glue.discard(slot)
        self.trees[slot] = [message.tokens[-1], *self._absent]
        self.copying.write(slot, 0, message.tokens)
        self.sampling.set(slot, params)
        self.forecast.admit(slot, params.temperature)
        self._process(slot, row, message.tokens)

    def _process(self, slot: int, row: DraftRow, certain: Sequence[int]) -> None:
        """Sets the slot's processors after these tokens. A grammar that is not compiled yet is left for later."""
        asked = row.request
        row.awaits_grammar = not self.sampling.grammar_ready(asked.params)
        params = replace(asked.params, structured_outputs=None) if row.awaits_grammar else asked.params
        length = len(asked.tokens) if asked.prompt_length is None else asked.prompt_length
        self.sampling.processors.clear(slot)
        row.constraint = self.sampling.process_leniently(
            slot, params, prompt=certain[:length], output=certain[length:], ends=asked.ends
        )

    def release(self, slot: int) -> None:
        """Frees a slot. Its keys stay until they are overwritten."""
        if (row := self.rows[slot]) is not None:
            self._left[slot] = row.tokens[: row.cached]
            self.rows[slot] = None
            self.trees[slot] = [ABSENT, *self._absent]
            self.sampling.clear(slot)

    def speculate(self, bell: Callable[[], bool] = never) -> SpeculationSet:
        """Runs glue, forecast and branch steps for the trees now under verification.

        Args:
            bell: whether the verifier waits for the set; ends the branches early in an anytime draft.
        """
        self._catch_up()
        batch, branches = len(self.rows), self.forecast.budget
        self._in_glue = {slot for slot, row in enumerate(self.rows) if row is not None and row.whole}
        forecasting = [row is not None and row.forecasts and row.whole for row in self.rows]
        selected, given, longest = self._batch(self._in_glue if any(forecasting) else (), self.shape.nodes)
        if not any(forecasting):
            if self._in_glue:  # the keys of the accepted path are needed all the same
                self.drafting.glue(given, longest)
            outcomes = np.full((batch, branches), ABSENT)
            trees = np.full((batch, branches, self.shape.nodes - 1), ABSENT)
            return SpeculationSet(nodes=outcomes, guesses=outcomes, trees=trees, draft=self._undrawn(branches))
        self.forecast.prepare(self.trees)
        grown = self.drafting.grow(given, longest, self._lookahead, bell)
        parts = (part.numpy() for part in self._courier.fetch(grown.nodes, grown.guesses, grown.trees))
        nodes, guesses, trees = (
            part if selected.index is None else _scattered(part, selected.slots, batch) for part in parts
        )
        if not all(forecasting):
            others = [slot for slot, forecasts in enumerate(forecasting) if not forecasts]
            guesses[others], trees[others] = ABSENT, ABSENT
        self._mend(nodes, guesses, trees)
        draft = self._undrawn(branches) if grown.drawn is None else grown.drawn
        return SpeculationSet(nodes=nodes, guesses=guesses, trees=trees, draft=draft)

    def commit(self, frame: OutcomeFrame, speculation: SpeculationSet) -> list[bool]:
        """Applies an outcome. The next trees are those of the hits, and n-grams where missed rows take them.

        Returns:
            the rows ``[B]`` that have a tree.
        """
        moves: list[tuple[int, int, int]] = []
        self._prefilled, self._lookahead = False, frame.lookahead or self.shape.depth
        found, served = lookup(frame.nodes, frame.bonus, speculation), [False] * len(self.rows)
        self.forecast.learn(
            [state == RowState.ACTIVE and there for state, there in zip(frame.states, found.prepared, strict=True)],
            frame.nodes,
            found.branches,
        )
        for slot, state in enumerate(frame.states):
            row = self.rows[slot]
            if row is not None and state == RowState.PREFILL:
                continue
            if row is None or state != RowState.ACTIVE:
                self.release(slot)
                continue
            node, tree = frame.nodes[slot], self.trees[slot]
            start = len(row.tokens)
            row.tokens.extend(tree[n] for n in (0, *self.shape.path(node)))
            certain = [*row.tokens[start + 1 :], frame.bonus[slot]]
            self.sampling.processors.commit(slot, certain)
            if row.awaits_grammar and self.sampling.grammar_ready(row.request.params):
                self._process(slot, row, [*row.tokens, frame.bonus[slot]])
            elif row.constraint is not None:
                for token in certain:
                    row.constraint.advance(token)
            self.copying.write(slot, start + 1, certain)
            if slot in self._in_glue:
                row.cached = len(row.tokens)
                if node > self.shape.depth:  # a leaf off the chain: its keys are in scratch
                    moves.append((slot, node - self.shape.depth - 1, start + self.shape.depths[node]))
            self.trees[slot], served[slot] = found.trees[slot], found.branches[slot] is not None
            if row.ngrams is not None:
                row.ngrams.extend(certain)
                if frame.ngram and row.forecasts and not served[slot]:
                    served[slot] = self._take_ngram(slot, row.ngrams)
        if moves:
            slots, scratch, positions = (torch.tensor(column) for column in zip(*moves, strict=True))
            self.runner.cache.keep(slots, scratch, positions)
        return served

    def _take_ngram(self, slot: int, ngrams: NgramIndex) -> bool:
        """Gives a missed row candidates from its own text, as the verifier does too. Returns whether there are any."""
        if proposed := ngrams.propose(self.shape.depth):
            self.trees[slot][1:] = [*proposed, *self._absent[len(proposed) :]]
        return bool(proposed)

    def waiting(self, states: Sequence[int], served: Sequence[bool], *, jit: bool) -> list[bool]:
        """Returns the rows ``[B]`` that wait for ``draft_now``: active ones without a tree, except ``ssd`` rows whose
        fallback is not ``jit``."""
        return [
            state == RowState.ACTIVE and not has and row is not None and (jit or not row.forecasts)
            for state, has, row in zip(states, served, self.rows, strict=True)
        ]

    def draft_now(self, missed: Sequence[bool]) -> DraftedTrees:
        """Drafts for the rows ``missed [B]`` while the verifier waits (fallback ``jit``). A row whose keys are not all
        here yet gets no candidates."""
        self._catch_up()
        waits = [slot for slot, row in enumerate(self.rows) if missed[slot] and row is not None and row.whole]
        trees = [self._absent] * len(self.rows)
        if not waits:
            return DraftedTrees(trees=trees, draft=self._undrawn())
        selected, given, longest = self._batch(waits, 1)
        chains, drawn = self.drafting.chains(given, longest, self._lookahead)
        for slot, chain in zip(selected.slots, chains.tolist(), strict=True):
            if slot in waits:
                trees[slot] = self.trees[slot][1:] = self._mended(slot, [], chain)
        return DraftedTrees(trees=trees, draft=self._undrawn() if drawn is None else drawn)

    def _undrawn(self, *branches: int) -> DraftProbs | None:
        """Returns the distributions ``[B, *branches, I, m]`` of trees that were not drawn, under rules that need
        them."""
        return None if self._sampler is None else self._sampler.undrawn(len(self.rows), *branches)

    def _mend(self, nodes: np.ndarray, guesses: np.ndarray, trees: np.ndarray) -> None:
        """Mends in place the branches ``[B, N]`` of rows with a grammar: compiled functions do not apply it below the
        guesses."""
        for slot, row in enumerate(self.rows):
            if row is None or row.constraint is None:
                continue
            for branch, (node, guess) in enumerate(zip(nodes[slot].tolist(), guesses[slot].tolist(), strict=True)):
                path = [*(self.trees[slot][n] for n in self.shape.path(node)), guess]
                if min(path) >= 0:
                    trees[slot, branch] = self._mended(slot, path, trees[slot, branch].tolist())

    def _mended(self, slot: int, path: list[int], tree: list[int]) -> list[int]:
        """Returns a comb below ``path``, its chain mended if the row has a grammar and candidates are not drawn."""
        row, depth = self.rows[slot], self.shape.depth
        if row is None or row.constraint is None or self.drafting.samples:
            return tree
        chain = list(takewhile(lambda token: token >= 0, tree[:depth]))
        return [*row.constraint.mended(path, chain), *tree[len(chain) :]]

    def _batch(self, used: Collection[int], width: int) -> tuple[Selection, DraftBatch, int]:
        """Selects the slots of a forward, ``used`` among them, with their whole trees or (``width`` 1) roots. Returns
        the greatest L in use, too.

        Slots that are empty or not whole are computed too. Their output is ignored, and their keys are written past the
        slot's valid prefix.
        """
        lengths = [len(left) if row is None else row.cached for row, left in zip(self.rows, self._left, strict=True)]
        longest = max((len(row.tokens) for row in self.rows if row is not None and row.whole), default=0)
        alike = self._sampler is None and not self.sampling.processors.active
        # Forwards that are compiled by themselves exist for all slots only.
        free = not self.runner.compile or self.drafting.fuses(longest)
        selected = self._selector.of(used) if alike and free and used else self._selector.all
        self.sampling.select(selected)
        self.copying.flush()
        rows = [[max(self.trees[slot][0], 0)] if width == 1 else self.trees[slot] for slot in selected.slots]
        tokens = self._written[selected.count, width].write(rows)
        above = self._lengths_written[selected.count].write([lengths[slot] for slot in selected.slots])
        return selected, DraftBatch(tokens, above, selected.index), longest

    def _catch_up(self) -> None:
        """Prefills committed tokens that have no keys here: one chunk per round, of the sequence that came first, so
        that the verifier waits no longer than that."""
        behind = [(row.number, slot, row) for slot, row in enumerate(self.rows) if row is not None and not row.whole]
        if self._prefilled or not behind:
            return
        _, slot, row = min(behind)  # numbers differ
        self._take_over(slot, row)
        chunk = row.tokens[row.cached : row.cached + self.runner.chunk]
        self.runner.prefill(slot, chunk, start=row.cached)
        row.cached += len(chunk)
        self._prefilled = True

    def _take_over(self, slot: int, row: DraftRow) -> None:
        """Copies the keys that another slot holds of the sequence, if they reach further than its own."""
        if not self.options.prefix_caching:
            return
        for source, (other, left) in enumerate(zip(self.rows, self._left, strict=True)):
            known = common_prefix(row.tokens, left if other is None else other.tokens[: other.cached])
            if known > row.cached:
                self.runner.copy(source, slot, known)
                row.cached = known


def _scattered(part: np.ndarray, slots: Sequence[int], batch: int) -> np.ndarray:
    """Returns the rows of some slots in an array for all ``batch`` slots; ``ABSENT`` in the others."""
    whole = np.full((batch, *part.shape[1:]), ABSENT, dtype=part.dtype)
    whole[list(slots)] = part
    return whole
