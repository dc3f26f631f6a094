"""The draft worker: what it knows of every sequence, and what it prepares while the verifier
checks. Decisions only; ``loops`` moves the frames."""

from __future__ import annotations

import torch
from torch import Tensor

from ..decoding.copying import CopyBias
from ..decoding.forecast import Forecast
from ..decoding.ngram import NgramIndex
from ..decoding.tree import ABSENT, TreeShape
from ..models.device import Courier
from ..models.runner import ForwardRunner
from .chooser import Chooser
from .drafting import Drafting
from .frames import OutcomeFrame, RowState, SpeculationSet
from .lookup import lookup
from .messages import Admit
from .prefix import common_prefix
from .sequence import DraftRow


class DraftWorker:
    """Prepares a speculation set per round for the trees under verification.

    Args:
        runner: of the draft model, over the same slots as the verifier's.
        shape: the candidate tree. forecast: which outcomes get a branch. ngram: whether missed rows
            may take n-grams (the verifier says when). prefix_caching: take over what other slots hold
            of a sequence. lookaheads: how far the verifier may tell it to draft, the shape's depth last.
            copying: what its scores gain by the sequences' own text.
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
        copying: CopyBias | None = None,
    ):
        self.ngram = ngram
        self.runner, self.shape, self.forecast = runner, shape, forecast
        batch, device = runner.batch, runner.device
        self.rows: list[DraftRow | None] = [None] * batch
        self._left: list[list[int]] = [[] for _ in range(batch)]
        """Tokens whose keys and values the slot's last sequence left behind."""
        self._prefix_caching, self._came, self._prefilled = prefix_caching, 0, False
        self.trees = torch.full((batch, shape.nodes), ABSENT)
        self._courier = Courier(device)
        kept = {"compile": runner.compile, "graphs": runner.graphs}
        self.chooser = Chooser(batch, runner.vocabulary, device, horizon=2 * shape.depth + 1, **kept)
        self.drafting = Drafting(
            runner, self.chooser, shape=shape, forecast=forecast, lookaheads=lookaheads, copying=copying
        )
        self._in_glue: set[int] = set()

    def warm_up(self) -> None:
        """Compile every form a round needs."""
        self.drafting.warm_up()
        self.chooser.warm_up()

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
        self.trees[message.slot] = ABSENT
        self.trees[message.slot, 0] = message.tokens[-1]
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
            self.trees[slot] = ABSENT
            self.chooser.clear(slot)

    def speculate(self) -> SpeculationSet:
        """Glue, forecast and branch steps for the trees now under verification."""
        self._catch_up()
        batch, branches = len(self.rows), self.forecast.budget
        lengths, longest = self._lengths()
        tokens = self._courier.place(self.trees)
        self._in_glue = {slot for slot, row in enumerate(self.rows) if row is not None and row.whole}
        forecasting = [row is not None and row.forecasts and row.whole for row in self.rows]
        if not any(forecasting):
            if self._in_glue:  # the accepted part of the tree will be needed all the same
                self.drafting.glue(tokens, lengths, longest)
            nodes = guesses = torch.full((batch, branches), ABSENT)
            trees = torch.full((batch, branches, self.shape.nodes - 1), ABSENT)
            return SpeculationSet(nodes=nodes, guesses=guesses, trees=trees, draft=self.drafting.nothing(branches))
        self.forecast.prepare(self.trees)
        nodes, guesses, trees, drawn = self.drafting.grow(tokens, lengths, longest)
        draft = self.drafting.nothing(branches) if drawn is None else drawn
        nodes, guesses, trees = self._courier.fetch(nodes, guesses, trees)
        if not all(forecasting):
            absent = ~torch.tensor(forecasting)[:, None]
            guesses, trees = guesses.masked_fill(absent, ABSENT), trees.masked_fill(absent[..., None], ABSENT)
        return SpeculationSet(nodes=nodes, guesses=guesses, trees=trees, draft=draft)

    def commit(self, frame: OutcomeFrame, speculation: SpeculationSet) -> Tensor:
        """Take in an outcome; the next trees are then those of the hits, and n-grams where missed
        rows take them. Returns which rows have a tree ``[B]``."""
        moves: list[tuple[int, int, int]] = []
        self._prefilled, self.drafting.lookahead = False, frame.lookahead or self.shape.depth
        trees, nodes = self.trees.tolist(), frame.nodes.tolist()
        for slot, state in enumerate(frame.states.tolist()):
            row = self.rows[slot]
            if row is not None and state == RowState.PREFILL:
                continue
            if row is None or state != RowState.ACTIVE:
                self.release(slot)
                continue
            node = nodes[slot]
            path = [0, *self.shape.path(node)]
            start = len(row.tokens)
            row.tokens.extend(trees[slot][n] for n in path)
            certain = [*row.tokens[start + 1 :], int(frame.bonus[slot])]
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
        if moves:
            slots, scratch, positions = (torch.tensor(column) for column in zip(*moves, strict=True))
            self.runner.cache.keep(slots, scratch, positions)
        found, hit = lookup(frame.nodes, frame.bonus, speculation)
        active = frame.states == RowState.ACTIVE
        self.forecast.learn(active, frame.nodes, frame.bonus, speculation.nodes, speculation.guesses)
        kept = (frame.states == RowState.PREFILL)[:, None]
        self.trees = torch.where(kept, self.trees, found.masked_fill(~active[:, None], ABSENT))
        return self._take_ngrams(frame, hit & active)

    def _take_ngrams(self, frame: OutcomeFrame, served: Tensor) -> Tensor:
        """What the verifier does too: candidates of missed rows from their own text. Returns ``served`` and these."""
        for slot, row in enumerate(self.rows):
            if row is None or row.ngrams is None or frame.states[slot] != RowState.ACTIVE:
                continue
            row.ngrams.extend([*row.tokens, int(frame.bonus[slot])][len(row.ngrams) :])
            if frame.ngram and row.forecasts and not served[slot]:
                found = row.ngrams.propose(self.shape.depth)
                if found:
                    self.trees[slot, 1 : len(found) + 1] = torch.tensor(found)
                    served[slot] = True
        return served

    def waiting(self, active: Tensor, served: Tensor, *, jit: bool) -> Tensor:
        """Rows ``[B]`` bool that wait for ``draft_now``: those without a tree, unless their fallback
        is to go on plainly."""
        waits = torch.tensor([row is not None and (jit or not row.forecasts) for row in self.rows])
        return active & ~served & waits

    def draft_now(self, missed: Tensor) -> Tensor:
        """Draft for the rows that missed, while the verifier waits (fallback ``jit``).

        Args: missed ``[B]`` bool. Returns: trees ``[B, W - 1]``, ``ABSENT`` in other rows and in those
        whose keys are not all there yet: they go on plainly.
        """
        self._catch_up()
        missed = missed & torch.tensor([row is not None and row.whole for row in self.rows])
        if not missed.any():
            self.drafting.drafted_from = self.drafting.nothing()
            return torch.full((len(self.rows), self.shape.nodes - 1), ABSENT)
        lengths, longest = self._lengths()
        roots = self.trees[:, :1].clamp(min=0).to(self.runner.device)
        drafted = self.drafting.chains(roots, lengths, longest).cpu().masked_fill(~missed[:, None], ABSENT)
        self.trees[:, 1:] = torch.where(missed[:, None], drafted, self.trees[:, 1:])
        return drafted

    def _lengths(self) -> tuple[Tensor, int]:
        """L of every slot, and the longest in use. Rows of a slot that is empty or not whole are computed
        and mean nothing: they land behind what it holds."""
        lengths = [len(left) if row is None else row.cached for row, left in zip(self.rows, self._left, strict=True)]
        longest = max((len(row.tokens) for row in self.rows if row is not None and row.whole), default=0)
        self.drafting.copying.flush()
        return self._courier.place(torch.tensor(lengths)), longest

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
