"""The draft worker: what it knows of every sequence, and what it prepares while the verifier
checks. Decisions only; ``loops`` moves the frames."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from ...decoding.forecast.base import Forecast
from ...decoding.text.copying import CopyBias
from ...decoding.text.ngram import NgramIndex
from ...decoding.text.prefix import common_prefix
from ...decoding.trees.shape import ABSENT, TreeShape
from ...models.device import Courier, Written
from ...models.runner import ForwardRunner
from ..round.frames import OutcomeFrame, RowState, SpeculationSet
from ..round.lookup import lookup
from ..sampling.selection import Selection, Selector
from ..sampling.slots import Chooser
from ..transport.messages import Admit
from .drafting import Drafting
from .sequence import DraftRow


class DraftWorker:
    """Prepares a speculation set per round for the trees under verification.

    Args:
        runner: of the draft model, over the same slots as the verifier's.
        shape: the candidate tree. forecast: which outcomes get a branch. ngram: whether missed rows
            may take n-grams (the verifier says when). prefix_caching: take over what other slots hold
            of a sequence. lookaheads: how far the verifier may tell it to draft, the shape's depth last. anytime:
            end a tree when the verifier waits for it. copying: what its scores gain by the sequences' own text.
    """

    def __init__(
        self,
        runner: ForwardRunner,
        *,
        shape: TreeShape,
        forecast: Forecast,
        ngram: bool = False,
        prefix_caching: bool = True,
        lookaheads: tuple[int, ...] = (),
        anytime: bool = False,
        copying: CopyBias | None = None,
    ):
        self.ngram = ngram
        self.runner, self.shape, self.forecast = runner, shape, forecast
        batch, device = runner.batch, runner.device
        self.rows: list[DraftRow | None] = [None] * batch
        self._left: list[list[int]] = [[] for _ in range(batch)]
        """Tokens whose keys and values the slot's last sequence left behind."""
        self._prefix_caching, self._came, self._prefilled = prefix_caching, 0, False
        self._absent = [ABSENT] * (shape.nodes - 1)
        self.trees = [[ABSENT, *self._absent] for _ in range(batch)]
        """Tokens ``[B][W]`` of the trees under verification."""
        # What a forecast learns is of all slots together; and compiling a tree takes a minute and a half for each
        # count, and again for each lookahead.
        few = not runner.compile or len(lookaheads) < 2
        counts = runner.counts if forecast.by_row and few else (batch,)
        self._selector = Selector(batch, counts, device)
        self._written = {
            (count, width): Written(count, width, device=device) for count in counts for width in {1, shape.nodes}
        }
        self._lengths_written = {count: Written(count, device=device) for count in counts}
        self._courier = Courier(device)
        horizon, compiled = 2 * shape.depth + 1, runner.compiled
        self.chooser = Chooser(batch, runner.vocabulary, device, horizon=horizon, compiled=compiled)
        self.drafting = Drafting(
            runner,
            self.chooser,
            shape=shape,
            forecast=forecast,
            lookaheads=lookaheads,
            anytime=anytime,
            copying=copying,
        )
        self._in_glue: set[int] = set()

    def warm_up(self) -> None:
        """Compile every form a round needs."""
        self.drafting.warm_up(self._selector)
        self.chooser.warm_up(self._selector.counts)

    def admit(self, message: Admit) -> None:
        self.release(message.slot)
        tokens = list(message.tokens[:-1])
        # A sequence that comes back finds its keys where they were, generated tokens' too.
        known = common_prefix(tokens, self._left[message.slot])
        ngrams = NgramIndex(message.tokens) if self.ngram else None
        row = self.rows[message.slot] = DraftRow(tokens, known, message.forecasts, self._came, ngrams)
        self._take_over(message.slot, row)
        self._came += 1
        self._in_glue.discard(message.slot)
        self.trees[message.slot] = [message.tokens[-1], *self._absent]
        self.drafting.copying.write(message.slot, 0, message.tokens)
        self.chooser.set(message.slot, message.params)
        self.forecast.admit(message.slot, message.params.temperature)
        length = len(message.tokens) if message.prompt_length is None else message.prompt_length
        prompt, output = message.tokens[:length], message.tokens[length:]
        self.chooser.processors.clear(message.slot)
        row.constraint = self.chooser.steer(
            message.slot, message.params, prompt=prompt, output=output, ends=message.ends
        )

    def release(self, slot: int) -> None:
        if (row := self.rows[slot]) is not None:
            self._left[slot] = row.tokens[: row.cached]
            self.rows[slot] = None
            self.trees[slot] = [ABSENT, *self._absent]
            self.chooser.clear(slot)

    def speculate(self) -> SpeculationSet:
        """Glue, forecast and branch steps for the trees now under verification."""
        self._catch_up()
        batch, branches = len(self.rows), self.forecast.budget
        self._in_glue = {slot for slot, row in enumerate(self.rows) if row is not None and row.whole}
        forecasting = [row is not None and row.forecasts and row.whole for row in self.rows]
        selected, lengths, longest = self._select(self._in_glue if any(forecasting) else ())
        tokens = self._write(selected, self.shape.nodes, self.trees)
        if not any(forecasting):
            if self._in_glue:  # the accepted part of the tree will be needed all the same
                self.drafting.glue(tokens, lengths, longest, selected.index)
            nodes = guesses = np.full((batch, branches), ABSENT)
            trees = np.full((batch, branches, self.shape.nodes - 1), ABSENT)
            return SpeculationSet(nodes=nodes, guesses=guesses, trees=trees, draft=self.drafting.nothing(branches))
        self.forecast.prepare(self.trees)
        nodes, guesses, trees, drawn = self.drafting.grow(tokens, lengths, longest, selected.index)
        draft = self.drafting.nothing(branches) if drawn is None else drawn
        at, guessed, below = (part.numpy() for part in self._courier.fetch(nodes, guesses, trees))
        if selected.index is not None:
            at, guessed, below = (_of_all(part, selected.slots, batch) for part in (at, guessed, below))
        if not all(forecasting):
            silent = [slot for slot, forecasts in enumerate(forecasting) if not forecasts]
            guessed[silent], below[silent] = ABSENT, ABSENT
        self._mend(at, guessed, below)
        return SpeculationSet(nodes=at, guesses=guessed, trees=below, draft=draft)

    def commit(self, frame: OutcomeFrame, speculation: SpeculationSet) -> list[bool]:
        """Take in an outcome; the next trees are then those of the hits, and n-grams where missed
        rows take them. Returns which rows have a tree ``[B]``."""
        moves: list[tuple[int, int, int]] = []
        self._prefilled, self.drafting.lookahead = False, frame.lookahead or self.shape.depth
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
            path = [0, *self.shape.path(node)]
            start = len(row.tokens)
            row.tokens.extend(tree[n] for n in path)
            certain = [*row.tokens[start + 1 :], frame.bonus[slot]]
            if self.chooser.processors.active:
                self.chooser.processors.commit(slot, certain)
            if row.constraint is not None:
                for token in certain:
                    row.constraint.advance(token)
            self.drafting.copying.write(slot, start + 1, certain)
            if slot in self._in_glue:
                row.cached = len(row.tokens)
                if node > self.shape.depth:  # off the chain: its keys stand in scratch
                    moves.append((slot, node - self.shape.depth - 1, start + self.shape.depths[node]))
            self.trees[slot], served[slot] = found.trees[slot], found.branches[slot] is not None
            self._take_ngram(slot, row, frame, certain, served)
        if moves:
            slots, scratch, positions = (torch.tensor(column) for column in zip(*moves, strict=True))
            self.runner.cache.keep(slots, scratch, positions)
        return served

    def _take_ngram(
        self, slot: int, row: DraftRow, frame: OutcomeFrame, certain: list[int], served: list[bool]
    ) -> None:
        """What the verifier does too: candidates of a missed row from its own text."""
        if row.ngrams is None:
            return
        row.ngrams.extend(certain)
        if frame.ngram and row.forecasts and not served[slot] and (found := row.ngrams.propose(self.shape.depth)):
            self.trees[slot][1:] = [*found, *self._absent[len(found) :]]
            served[slot] = True

    def waiting(self, states: Sequence[int], served: Sequence[bool], *, jit: bool) -> list[bool]:
        """Rows ``[B]`` that wait for ``draft_now``: active ones without a tree, unless their fallback
        is to go on plainly."""
        return [
            state == RowState.ACTIVE and not has and row is not None and (jit or not row.forecasts)
            for state, has, row in zip(states, served, self.rows, strict=True)
        ]

    def draft_now(self, missed: Sequence[bool]) -> list[list[int]]:
        """Draft for the rows that missed, while the verifier waits (fallback ``jit``).

        Args: missed ``[B]``. Returns: trees ``[B][W - 1]``, ``ABSENT`` in other rows and in those
        whose keys are not all there yet: they go on plainly.
        """
        self._catch_up()
        waits = [slot for slot, row in enumerate(self.rows) if missed[slot] and row is not None and row.whole]
        drafted = [self._absent] * len(self.rows)
        if not waits:
            self.drafting.drafted_from = self.drafting.nothing()
            return drafted
        selected, lengths, longest = self._select(waits)
        roots = self._write(selected, 1, [[max(tree[0], 0)] for tree in self.trees])
        chains = self.drafting.chains(roots, lengths, longest, selected.index).tolist()
        for slot, chain in zip(selected.slots, chains, strict=True):
            if slot in waits:
                drafted[slot] = self.trees[slot][1:] = self._mended(slot, [], chain)
        return drafted

    def _mend(self, nodes: np.ndarray, guesses: np.ndarray, trees: np.ndarray) -> None:
        """In place, the branches ``[B, N]`` of rows whose output follows a grammar: what is drafted at once has none
        below the guesses."""
        for slot, row in enumerate(self.rows):
            if row is None or row.constraint is None:
                continue
            for branch, (node, guess) in enumerate(zip(nodes[slot].tolist(), guesses[slot].tolist(), strict=True)):
                path = [*(self.trees[slot][n] for n in self.shape.path(node)), guess]
                if min(path) >= 0:
                    trees[slot, branch] = self._mended(slot, path, trees[slot, branch].tolist())

    def _mended(self, slot: int, path: list[int], tree: list[int]) -> list[int]:
        """A comb below ``path``, its chain mended where the row has a grammar and candidates are not drawn."""
        row, depth = self.rows[slot], self.shape.depth
        if row is None or row.constraint is None or self.drafting.samples:
            return tree
        chain = list(takewhile(lambda token: token >= 0, tree[:depth]))
        return [*row.constraint.mended(path, chain), *tree[len(chain) :]]

    def _select(self, used: Collection[int]) -> tuple[Selection, Tensor, int]:
        """Slots of a forward, L of each, and the longest in use. Rows of a slot that is empty or not whole are
        computed and mean nothing: they land behind what it holds."""
        lengths = [len(left) if row is None else row.cached for row, left in zip(self.rows, self._left, strict=True)]
        longest = max((len(row.tokens) for row in self.rows if row is not None and row.whole), default=0)
        alike = not self.chooser.processors.active and self.drafting.sampler is None
        # What is compiled step by step is compiled for all slots.
        compiled = not self.runner.compile or self.drafting.at_once(longest)
        selected = self._selector.of(used) if alike and compiled and used else self._selector.all
        self.chooser.select(selected)
        self.drafting.copying.flush()
        return selected, self._lengths_written[selected.count].write([lengths[s] for s in selected.slots]), longest

    def _write(self, selected: Selection, width: int, rows: Sequence[Sequence[int]]) -> Tensor:
        """Of the rows of all slots, the selected ones as a tensor."""
        return self._written[selected.count, width].write([rows[slot] for slot in selected.slots])

    def _catch_up(self) -> None:
        """Prefill what was committed without going through here: one chunk a round, of the sequence that
        came first, for the verifier waits no longer than that."""
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
        """What any slot holds of a sequence, if that is more than it has."""
        if not self._prefix_caching:
            return
        for source, (other, left) in enumerate(zip(self.rows, self._left, strict=True)):
            known = common_prefix(row.tokens, left if other is None else other.tokens[: other.cached])
            if known > row.cached:
                self.runner.copy(source, slot, known)
                row.cached = known


def _of_all(part: np.ndarray, slots: Sequence[int], batch: int) -> np.ndarray:
    """Rows of some slots among those of all; ``ABSENT`` in the others."""
    whole = np.full((batch, *part.shape[1:]), ABSENT, dtype=part.dtype)
    whole[list(slots)] = part
    return whole
