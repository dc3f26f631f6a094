"""The draft worker: what it knows of every sequence, and what it prepares while the verifier
checks. Decisions only; ``loops`` moves the frames."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..decoding.forecast import Forecast
from ..decoding.lookahead import first_lookahead
from ..decoding.ngram import NgramIndex
from ..decoding.processors import TreePaths
from ..decoding.sampling import perturbed, scores
from ..decoding.support import DraftProbs
from ..decoding.tree import ABSENT, TreeShape
from ..models.device import Courier
from ..models.rows import RowPlan
from ..models.runner import ForwardRunner, Layout
from .branches import BranchSteps
from .candidates import best_tokens, comb_tokens, noise_at
from .chooser import Chooser
from .frames import OutcomeFrame, RowState, SpeculationSet
from .lookup import lookup
from .messages import Admit
from .prefix import common_prefix
from .rules import CandidateSampler, stacked
from .sequence import DraftRow


class DraftWorker:
    """Prepares a speculation set per round for the trees under verification.

    Args:
        runner: of the draft model, over the same slots as the verifier's.
        shape: the candidate tree. forecast: which outcomes get a branch. ngram: whether missed rows
            may take n-grams (the verifier says when). prefix_caching: take over what other slots hold
            of a sequence. lookaheads: how far the verifier may tell it to draft, the shape's depth last.
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
        self._depths = shape.depth_index(device)
        self._paths = TreePaths(shape, device)
        self._glue = RowPlan.tree("glue", shape)
        self._step = RowPlan.sequential("jit", 1)
        self._branches = BranchSteps(shape, forecast.budget, device)
        self._width = len(shape.children(0))
        self.sampler: CandidateSampler | None = None
        """Under ``rejection`` and ``block``: draws the candidates."""
        self.drafted_from: DraftProbs | None = None
        """What ``draft_now``'s last trees were drawn from ``[B, I, m]``, if they were."""
        self._in_glue: set[int] = set()
        self._lookaheads = lookaheads or (shape.depth,)
        self.lookahead = first_lookahead(self._lookaheads)
        """K of what is drafted now."""
        self._whole: dict[int, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {}
        self._chain: dict[int, Callable[..., Tensor]] = {}
        self._silence = torch.zeros(batch, 2 * shape.depth + 1, runner.vocabulary, device=device)

    @property
    def _samples(self) -> bool:
        """Whether candidates are drawn, not matched: some row samples, under a rule that compares
        probabilities."""
        return self.sampler is not None and self.chooser.params.random

    def warm_up(self) -> None:
        """Compile every form a round needs."""
        self.runner.warm_up([self._glue, self._step])
        nodes = torch.zeros(len(self.rows), self.forecast.budget, dtype=torch.int64, device=self.runner.device)
        self.runner.warm_up([self._branches.plans[0]], self._branches.layout(0, nodes))
        self.chooser.warm_up()
        lengths = torch.zeros(len(self.rows), dtype=torch.int64, device=self.runner.device)
        for depth in self._lookaheads if self.runner.fuses else ():
            self.lookahead = depth
            self._grow_at_once(self.trees.to(lengths.device), lengths)
            self._draft_at_once(self.trees[:, :1].clamp(min=0).to(lengths.device), lengths)
        self.lookahead = first_lookahead(self._lookaheads)

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
        draft = self.sampler.nothing(batch, branches) if self.sampler is not None else None
        if any(forecasting):
            self.forecast.prepare(self.trees)
            if self._at_once(longest):
                nodes, guesses, trees = self._grow_at_once(tokens, lengths)
            else:
                nodes, guesses, trees, drawn = self._grow_stepwise(tokens, lengths, longest)
                draft = drawn if drawn is not None else draft
        else:
            if self._in_glue:  # the accepted part of the tree will be needed all the same
                self.runner.forward(self._glue, tokens.clamp(min=0), lengths, longest=longest)
            nodes = guesses = torch.full((batch, branches), ABSENT)
            trees = torch.full((batch, branches, self.shape.nodes - 1), ABSENT)
            return SpeculationSet(nodes=nodes, guesses=guesses, trees=trees, draft=draft)
        nodes, guesses, trees = self._courier.fetch(nodes, guesses, trees)
        if not all(forecasting):
            absent = ~torch.tensor(forecasting)[:, None]
            guesses, trees = guesses.masked_fill(absent, ABSENT), trees.masked_fill(absent[..., None], ABSENT)
        return SpeculationSet(nodes=nodes, guesses=guesses, trees=trees, draft=draft)

    def _at_once(self, longest: int) -> bool:
        """Whether this round's drafting may run as one compiled function: compiled for the shortest
        context only (it takes the compiler half a minute), and without what only single steps can do."""
        short = longest + self.shape.depth < self.runner.contexts[0]
        params, processors = self.chooser.params, self.chooser.processors
        return self.runner.fuses and short and not (params.filtered or processors.active or self._samples)

    def _grow(
        self,
        forward: Callable[[RowPlan, Tensor, Layout | None], Tensor],
        foresee: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        pick: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor],
        tokens: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The draft's half of a round: glue, forecast, K branch steps.

        Args:
            forward: plan, row tokens ``[B, R]`` and layout to logits ``[B, R, V]``. foresee: the
                tree's logits and how far ahead of L each row's noise is ``[B, W]`` to outcomes. pick: logits, how
                far ahead, the branches' nodes, the tokens fed and the step to the next candidates
                ``[B, N, 1 + s]``, the chain's first. tokens: ``[B, W]``.

        Returns: nodes and guesses ``[B, N]``, and trees ``[B, N, W - 1]``.
        """
        ahead = self._depths.expand(len(tokens), -1)
        nodes, guesses = foresee(forward(self._glue, tokens.clamp(min=0), None), ahead)
        ranked, fed, depths = [], guesses, self._depths[nodes]
        for step, plan in enumerate(self._branches.plans[: self.lookahead]):
            logits = forward(plan, fed, self._branches.layout(step, nodes))
            ranked.append(pick(logits, depths + 1 + step, nodes, fed, step))
            fed = ranked[-1][..., 0]
        return nodes, guesses, comb_tokens(ranked, self.shape.depth)

    def _grow_stepwise(
        self, tokens: Tensor, lengths: Tensor, longest: int
    ) -> tuple[Tensor, Tensor, Tensor, DraftProbs | None]:
        """Any parameters and rules. The last of the four: what the branches were drawn from
        ``[B, N, I, m]``, if they were. Guesses are ranked with plain decoding's noise under every
        rule: the bonus token is drawn with it too."""
        noise, sampler, drawn = self.chooser.noise(lengths), self.sampler if self._samples else None, []
        params = self.chooser.params
        paths = above = self._paths.of(tokens) if self.chooser.processors.active else None

        def score(logits: Tensor, ahead: Tensor) -> Tensor:
            logits = self.chooser.processed(logits, paths)
            return scores(logits, params, None if noise is None else noise_at(noise, ahead))

        def foresee(logits: Tensor, ahead: Tensor) -> tuple[Tensor, Tensor]:
            quiet = None if sampler is None else self.chooser.processed(logits, paths)
            return self.forecast.outcomes(score(logits, ahead), tokens, quiet)

        def pick(logits: Tensor, ahead: Tensor, nodes: Tensor, fed: Tensor, step: int) -> Tensor:
            nonlocal paths
            if above is not None and paths is not None:  # the path to a branch's node, its guess, its tokens so far
                before = paths if step else above.gather(1, nodes[..., None].expand(-1, -1, above.shape[2]))
                paths = torch.cat([before, fed[..., None]], dim=-1)
            if sampler is None:
                return best_tokens(score(logits, ahead), self._width)
            logits = self.chooser.processed(logits, paths)
            found, draft = sampler.children(logits, params, lengths[:, None] + ahead - step, step)
            drawn.append(draft)
            return found

        grown = self._grow(
            lambda plan, rows, layout: self.runner.forward(plan, rows, lengths, longest=longest, layout=layout),
            foresee,
            pick,
            tokens,
        )
        return *grown, stacked(drawn, self.shape.depth) if drawn else None

    @torch.no_grad()
    def _grow_at_once(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same as one compiled function: the small draft's time is mostly that of being
        called. Noise is zero while nothing samples; filters and processors it cannot do."""
        if self.lookahead not in self._whole:
            grow, runner, context, width = self._grow, self.runner, self.runner.contexts[0], self._width

            def tree(
                tokens: Tensor, lengths: Tensor, temperature: Tensor, noise: Tensor
            ) -> tuple[Tensor, Tensor, Tensor]:
                def score(logits: Tensor, ahead: Tensor) -> Tensor:
                    return perturbed(logits, noise_at(noise, ahead), temperature)

                return grow(
                    lambda plan, rows, layout: runner.logits(plan, rows, lengths, context, layout),
                    lambda logits, ahead: self.forecast.outcomes(score(logits, ahead), tokens),
                    lambda logits, ahead, nodes, fed, step: best_tokens(score(logits, ahead), width),
                    tokens,
                )

            self._whole[self.lookahead] = runner.compiled(tree)
        noise = self.chooser.noise(lengths)
        quiet = self._silence if noise is None else noise
        return self._whole[self.lookahead](tokens, lengths, self.chooser.params.temperature, quiet)

    def commit(self, frame: OutcomeFrame, speculation: SpeculationSet) -> Tensor:
        """Take in an outcome; the next trees are then those of the hits, and n-grams where missed
        rows take them. Returns which rows have a tree ``[B]``."""
        moves: list[tuple[int, int, int]] = []
        self._prefilled, self.lookahead = False, frame.lookahead or self.shape.depth
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
            self.drafted_from = self.sampler.nothing(len(self.rows)) if self.sampler is not None else None
            return torch.full((len(self.rows), self.shape.nodes - 1), ABSENT)
        lengths, longest = self._lengths()
        roots = self.trees[:, :1].clamp(min=0).to(self.runner.device)
        if self._at_once(longest):
            self.drafted_from = self.sampler.nothing(len(self.rows)) if self.sampler is not None else None
            found = self._draft_at_once(roots, lengths)
        else:
            found = self._draft_stepwise(roots, lengths, longest)
        drafted = found[:, 0].cpu().masked_fill(~missed[:, None], ABSENT)
        self.trees[:, 1:] = torch.where(missed[:, None], drafted, self.trees[:, 1:])
        return drafted

    def _draft_stepwise(self, fed: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """Candidates ``[B, 1, W - 1]`` below the roots ``fed [B, 1]``. Any parameters and rules."""
        noise, ranked, drawn = self.chooser.noise(lengths), [], []
        paths = fed.new_empty(len(fed), 1, 0)
        for step in range(self.lookahead):
            logits = self.runner.forward(self._step, fed, lengths + step, longest=longest + step)
            logits = self.chooser.processed(logits, paths)
            if self._samples and self.sampler is not None:
                found, draft = self.sampler.children(logits, self.chooser.params, lengths[:, None], step)
                ranked.append(found)
                drawn.append(draft)
            else:
                ahead = None if noise is None else noise[:, step : step + 1]
                ranked.append(best_tokens(scores(logits, self.chooser.params, ahead), self._width))
            fed = ranked[-1][..., 0]
            if self.chooser.processors.active:
                paths = torch.cat([paths, fed[..., None]], dim=-1)
        if self.sampler is not None:
            nothing = self.sampler.nothing(len(self.rows))
            self.drafted_from = stacked(drawn, self.shape.depth)[:, 0] if drawn else nothing
        return comb_tokens(ranked, self.shape.depth)

    @torch.no_grad()
    def _draft_at_once(self, roots: Tensor, lengths: Tensor) -> Tensor:
        """The same as one compiled function: the verifier waits for it."""
        if (depth := self.lookahead) not in self._chain:
            runner, step, width = self.runner, self._step, self._width

            def chain(fed: Tensor, lengths: Tensor, temperature: Tensor, noise: Tensor) -> Tensor:
                ranked = []
                for ahead in range(depth):
                    logits = runner.logits(step, fed, lengths + ahead, runner.contexts[0])
                    ranked.append(best_tokens(perturbed(logits, noise[:, ahead : ahead + 1], temperature), width))
                    fed = ranked[-1][..., 0]
                return comb_tokens(ranked, self.shape.depth)

            self._chain[depth] = runner.compiled(chain)
        noise = self.chooser.noise(lengths)
        quiet = self._silence if noise is None else noise
        return self._chain[depth](roots, lengths, self.chooser.params.temperature, quiet)

    def _lengths(self) -> tuple[Tensor, int]:
        """L of every slot, and the longest in use. Rows of a slot that is empty or not whole are computed
        and mean nothing: they land behind what it holds."""
        lengths = [len(left) if row is None else row.cached for row, left in zip(self.rows, self._left, strict=True)]
        longest = max((len(row.tokens) for row in self.rows if row is not None and row.whole), default=0)
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
