"""The verifier worker: the target model, its sequences, and what each round decides.
Decisions only; ``loops`` moves the frames and the messages."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ...decoding.logprobs import token_logprobs
from ...decoding.trees.shape import ABSENT, TreeShape
from ...decoding.verify.draft_probs import DraftProbs
from ...errors import RequestError
from ...models.cuda.device import Written
from ...models.rows import RowPlan, verify_plans
from ...models.runner import ForwardRunner
from ...request.params import Method, Origin
from ..policy.steering import Steering
from ..round.frames import RowState, SpeculationSet
from ..round.lookup import lookup
from ..round.verdict import Commit, Verdict
from ..sampling.selection import Selection, Selector
from ..sampling.slots import SlotSampling
from ..transport.messages import Admit, Submit
from .decider import Decider
from .invariance import interchangeable
from .prefix import PrefixCache
from .prompts import Prompts
from .self_draft import SelfDraft
from .sequence import Sequence

Committed = tuple[list[int], list[Commit]]


class VerifierWorker:
    """Leads the round.

    Args:
        runner: of the target model.
        method: of requests that do not choose one. jit: whether missed ``ssd`` rows wait for the
            draft (fallback ``jit``) or go on plainly (``none``). ngram: whether they may take an n-gram.
        strict: every decode forward has the same rows, plain decoding too, unless it is seen that fewer give the
            same bits (``invariance``). Otherwise plain rounds run one row a sequence.
        governed: decode plainly while speculation does not pay.
        lookaheads: the draft may be told to draft less deep than ``shape`` is; the last is its depth.
        ends: end-of-text ids. max_model_len: tokens of a sequence, prompt included.
        prefix_caching: reuse what earlier prompts left.
    """

    def __init__(
        self,
        runner: ForwardRunner,
        *,
        shape: TreeShape,
        method: Method,
        jit: bool,
        strict: bool,
        ngram: bool = False,
        governed: bool,
        lookaheads: tuple[int, ...] = (),
        ends: frozenset[int],
        max_model_len: int,
        prefix_caching: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.runner, self.shape, self.jit = runner, shape, jit
        self.method: Method = method
        lookaheads = lookaheads or (shape.depth,)
        self.steering = Steering(governed=governed, ngram=ngram, jit=jit, lookaheads=lookaheads)
        self.ends, self.max_model_len, self.clock = ends, max_model_len, clock
        self.padded = strict
        """Whether all decode forwards have the same rows."""
        self.refused: list[Sequence] = []
        """Not to be decoded (``Sequence.error``); whoever reports them empties it."""
        self.rows: list[Sequence | None] = [None] * runner.batch  # those that decode
        self.prompts = Prompts(runner, PrefixCache(runner.batch, runner.chunk, enabled=prefix_caching))
        self.drafting = True
        """False while there is no draft: everything decodes plainly then."""
        self.self_draft: SelfDraft | None = None  # drafts for rows of method ``self``
        self._absent = [ABSENT] * (shape.nodes - 1)
        self.trees = [[ABSENT, *self._absent] for _ in self.rows]
        """Tokens ``[B][W]`` of the next round's trees."""
        self.origins: list[Origin] = ["plain"] * runner.batch  # of the candidates in ``trees``
        self.lookups = self.hits = 0  # of the round before
        self._missed_s = self._trees_s = 0.0
        horizon, batch = shape.depth + 1, runner.batch
        self.chooser = SlotSampling(batch, runner.vocabulary, runner.device, horizon=horizon, compiled=runner.compiled)
        self.decider = Decider(runner, shape, self.chooser, clock)
        self._trees = verify_plans(shape, lookaheads)
        self._tree, self._one = self._trees[shape.depth], RowPlan.sequential("one", 1)
        self._selector = Selector(batch, (batch,) if strict else runner.counts, runner.device)
        self._lengths = {count: Written(count, device=runner.device) for count in (*runner.counts, batch)}

    def warm_up(self) -> None:
        """Compile every form a round needs, and find out which may take turns."""
        runner, decider, own, plans = self.runner, self.decider, self.self_draft, [self._one, *self._trees.values()]
        if self.padded:
            selector = Selector(runner.batch, runner.counts, runner.device)
            self.padded = not interchangeable(runner, decider, plans, selector)
            self._selector = self._selector if self.padded else selector
        if not runner.fuses:
            return
        self.chooser.warm_up(self._selector.counts)
        for count in self._selector.counts:
            selected = self._selector.first(count)
            self.chooser.select(selected)
            trees = self.trees[:count]
            decider.warm_up([self._tree] if self.padded else plans, trees, selected.index)
            if not self.padded:
                seconds = {depth: decider.forward_s(plan, trees, selected.index) for depth, plan in self._trees.items()}
                plain_s = decider.forward_s(self._one, trees, selected.index)
                self.steering.calibrate(count, plain_s, seconds)
                if own is not None and own.governor is not None:
                    own.governor.share = min(1.0, plain_s / seconds[self.shape.depth])
        if own is not None:
            own.warm_up()

    @property
    def idle(self) -> bool:
        return not (self.prompts.waiting or self.prompts.filling or self.decoding)

    @property
    def decoding(self) -> bool:
        return any(row is not None for row in self.rows)

    @property
    def _admitted(self) -> list[tuple[int, Sequence]]:
        return [*((slot, row) for slot, row in enumerate(self.rows) if row is not None), *self.prompts.filling.items()]

    def speculates(self, row: Sequence | None) -> bool:
        return row is not None and self.drafting and self.steering.arm(row) in ("ssd", "sd")

    @property
    def speculating(self) -> bool:
        """Whether the draft takes part in the next round."""
        return any(self.speculates(row) for _, row in self._admitted)

    def submit(self, message: Submit) -> None:
        """Queue a request (checked by the front)."""
        method: Method = message.params.method or self.method
        self.prompts.waiting.append(Sequence.of(message, method, self.max_model_len, self.ends))

    def cancel(self, request: int) -> Sequence | None:
        """Forget a request; its slot is free at once."""
        for slot, row in self._admitted:
            if row.request == request:
                self._free(slot)
                return row
        return self.prompts.forget(request)

    def admit(self) -> None:
        """Give free slots to waiting requests, with what those or others hold of their prompts."""
        self.prompts.admit([slot for slot, row in enumerate(self.rows) if row is None])

    def introduce(self) -> list[Admit]:
        """What to tell the draft of sequences that speculate from now on, or in another way: new ones, and
        those that decoded without it for a while."""
        told = []
        for slot, row in self._admitted:
            forecasts = self.steering.arm(row) == "ssd"
            if self.speculates(row) and (not row.at_draft or row.forecasts != forecasts):
                row.at_draft, row.forecasts = True, forecasts
                self.trees[slot][1:] = self._absent  # of what stands there the draft does not know
                told.append(row.introduction(slot, self.ends))
        return told

    def observe(self, verdict: Verdict, *, seconds: float, waited_s: float, draft_s: float) -> None:
        """How a round went. ``waited_s``: of it, for the draft; ``draft_s``: the draft's half of it."""
        spent = {"seconds": seconds, "waited_s": waited_s, "draft_s": draft_s, "missed_s": self._trees_s}
        if self.drafting:  # without a draft it says nothing about speculation
            self.steering.observe(verdict, **spent)

    def prefill(self) -> bool:
        """One chunk of the prompt that came first: running rows wait no longer than that. Sequences whose
        prompt is whole decode from now on. Returns whether a chunk was computed."""
        computed, whole = self.prompts.compute()
        for slot, row in whole:
            self._start(slot, row)
        return computed

    def _start(self, slot: int, row: Sequence) -> None:
        prompt, output = row.prompt_and_output()
        try:
            ends = row.held_off(self.ends)
            row.constraint = self.chooser.process(slot, row.params, prompt=prompt, output=output, ends=ends)
        except RequestError as error:
            row.error = str(error)
            self.refused.append(row)
            self._free(slot)
            return
        self.rows[slot] = row
        self.steering.start(row)
        self.chooser.set(slot, row.params)
        self.trees[slot] = [row.root, *self._absent]
        row.started_s = self.clock()

    def verify(self) -> Verdict:
        """One target forward over the trees, and what it decides. Nothing, while no prompt is whole."""
        if not self.decoding:
            nothing = [0] * len(self.rows)
            return Verdict(nothing, nothing, self._states(), commits=[], forward_s=0.0)
        selected, known, lengths = self._select()
        own = self.self_draft
        drafted_s = own.fill(self.rows, self.trees, self.origins, lengths) if own is not None else 0.0
        plan = self._plan()
        context = self.runner.context_for(max(len(r.tokens) for r in self.rows if r is not None) + max(plan.limits) + 1)
        noise = self.chooser.prepared(known, lengths)
        trees = [self.trees[slot] for slot in selected.slots]
        logits, nodes, bonus, forward_s = self.decider.decide(plan, context, lengths, trees, noise, selected.index)
        if selected.index is not None:
            nodes, bonus = self._of_all(selected, nodes), self._of_all(selected, bonus)
        states, commits = self._commit(selected, nodes, bonus, logits)
        self.steering.ran(selected.count)
        ngram = self.steering.ngram
        self.steering.learn(commits, forward_s)
        return Verdict(nodes, bonus, states, commits, forward_s, ngram, self.steering.lookahead(self.rows), drafted_s)

    def _select(self) -> tuple[Selection, list[int], Tensor]:
        """Slots of the coming forward, and L of each, twice. Rows of empty ones are computed and mean nothing: they
        land behind what they hold."""
        alike = self.decider.judge is None and self.self_draft is None and not self.chooser.processors.active
        used = (slot for slot, row in enumerate(self.rows) if row is not None)
        selected = self._selector.of(used) if alike else self._selector.all
        self.chooser.select(selected)
        held, rows = self.prompts.prefixes.held, self.rows
        known = [len(held[slot] if (row := rows[slot]) is None else row.tokens) for slot in selected.slots]
        return selected, known, self._lengths[selected.count].write(known)

    def _of_all(self, selected: Selection, values: list[int]) -> list[int]:
        whole = [0] * len(self.rows)
        for slot, value in zip(selected.slots, values, strict=True):
            whole[slot] = value
        return whole

    def prepare(self) -> None:
        """Of the next verification what needs no tree: its noise. While the draft may have to be waited for."""
        if self.chooser.params.random:
            _, known, lengths = self._select()
            self.chooser.prepare(known, lengths)

    def advance(self, verdict: Verdict, speculation: SpeculationSet | None) -> list[bool]:
        """Next trees by lookup (``None``: no draft took part). Returns the rows ``[B]`` that
        wait for a tree drafted now."""
        missed = [False] * len(self.rows)
        self.lookups = self.hits = 0
        if speculation is None:
            self.trees = [[token, *self._absent] for token in verdict.bonus]
        else:
            found = lookup(verdict.nodes, verdict.bonus, speculation)
            self.trees = found.trees
            if self.decider.judge is not None:
                self.decider.judge.take(found.branches, speculation.draft)
            for slot, row in enumerate(self.rows):
                if row is None or not self.speculates(row):
                    continue
                hit, prepared = found.branches[slot] is not None, found.prepared[slot]
                row.draft_behind = row.forecasts and not prepared
                if row.forecasts and prepared:
                    row.hit = hit
                    row.record.count_lookup(hit)
                    self.lookups += 1
                    self.hits += hit
                self.origins[slot] = "hit" if hit else "miss"
                if not hit and row.forecasts and verdict.ngram and self._take_ngram(slot, row):
                    continue
                missed[slot] = not hit and (self.jit or not row.forecasts)
        for slot, row in enumerate(self.rows):
            if row is None:
                self.trees[slot] = [ABSENT, *self._absent]
                continue
            row.waited = missed[slot]
            row.draft_behind &= self.speculates(row)
            if row.ngrams is not None and self.steering.arm(row, drafting=self.drafting) == "ngram":
                self._take_ngram(slot, row)
        self._missed_s, self._trees_s = self.clock(), 0.0
        return missed

    def _take_ngram(self, slot: int, row: Sequence) -> bool:
        """The slot's tree from what its own text says, if that says anything."""
        assert row.ngrams is not None
        found, self.origins[slot] = row.ngrams.index.propose(self.shape.depth), "miss"
        if found:
            self.trees[slot][1:] = [*found, *self._absent[len(found) :]]
            self.steering.name(slot)
            if self.decider.judge is not None:
                self.decider.judge.name(slot)
        return bool(found)

    def fill(self, missed: list[bool], drafted: list[list[int]], draft: DraftProbs | None = None) -> None:
        """Trees drafted now, ``[B][W - 1]``, for the rows that missed; under rules that need it,
        what they were drawn from ``[B, I, m]``."""
        waited = [slot for slot, waits in enumerate(missed) if waits]
        for slot in waited:
            row, self.trees[slot][1:] = self.rows[slot], drafted[slot]
            if row is not None and not row.forecasts:
                row.draft_behind = drafted[slot] == self._absent
        self._trees_s = self.clock() - self._missed_s
        if (fallback := self.steering.fallback) is not None:
            fallback.waited(self._trees_s)
            fallback.sources.update((slot, "jit") for slot in waited)
        if self.decider.judge is not None and draft is not None:
            self.decider.judge.fill(missed, draft)

    def lose_draft(self) -> None:
        """Go on plainly. Losslessness does not depend on the draft: only speed is lost."""
        self.drafting = False
        for tree in self.trees:
            tree[1:] = self._absent
        for _, row in self._admitted:
            row.at_draft = row.draft_behind = False

    def _plan(self) -> RowPlan:
        rows = [row for row in self.rows if row is not None]
        plain = all(tree[1:] == self._absent for tree in self.trees)
        if plain and (not self.padded or all(row.method == "none_fast" for row in rows)):
            return self._one
        if self.padded or self.decider.judge is not None or len(self._trees) == 1:
            return self._tree
        deepest = max(len(self._absent) - tree.count(ABSENT) for tree in self.trees)  # of chains: they have no holes
        return next((plan for depth, plan in self._trees.items() if depth >= deepest), self._tree)

    def _commit(self, selected: Selection, nodes: list[int], bonus: list[int], logits: Tensor) -> Committed:
        states, commits, moves = self._states(), list[Commit](), list[tuple[int, int, int]]()
        for slot, (node, row) in enumerate(zip(nodes, self.rows, strict=True)):
            if row is None:
                continue
            tree = self.trees[slot]
            depth, chain, length = self.shape.depths[node], self.shape.depth, len(row.tokens)
            drafted, path = chain - tree[1 : chain + 1].count(ABSENT), self.shape.path(node)
            row.record.count_round(drafted=drafted, accepted=depth)
            tokens, finished = row.commit([tree[n] for n in path], bonus[slot])
            self.chooser.processors.commit(slot, tokens)
            logprobs = None
            if row.params.logprobs is not None:
                rows = logits[selected.slots.index(slot), [0, *path][: len(tokens)]]
                logprobs = token_logprobs(rows, tokens, row.params.logprobs)
            commits.append(
                Commit(
                    request=row.request,
                    tokens=tokens,
                    accepted=min(depth, len(tokens)),
                    depth=depth,
                    drafted=drafted,
                    hit=row.hit,
                    origin=self.origins[slot] if drafted or depth else "plain",
                    finished=finished,
                    logprobs=logprobs,
                    sequence=row,
                    slot=slot,
                )
            )
            row.hit = None
            row.at_draft = row.at_draft and self.speculates(row)
            if row.at_draft:
                states[slot] = RowState.FINISHED if finished else RowState.ACTIVE
            if finished:
                self._free(slot)
            elif node > chain:
                moves.append((slot, node - chain - 1, length + depth))
        if moves:
            slots, scratch, positions = (torch.tensor(column) for column in zip(*moves, strict=True))
            self.runner.keep(slots, scratch, positions)
        return states, commits

    def _states(self) -> list[int]:
        """What the draft must know of slots that do not decode."""
        states = [int(RowState.EMPTY)] * len(self.rows)
        for slot, row in self.prompts.filling.items():
            row.at_draft = row.at_draft and self.speculates(row)
            if row.at_draft:
                states[slot] = int(RowState.PREFILL)
        return states

    def _free(self, slot: int) -> None:
        self.rows[slot] = None
        self.prompts.leave(slot)
        self.trees[slot] = [ABSENT, *self._absent]
        self.chooser.clear(slot)
