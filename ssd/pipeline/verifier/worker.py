"""The verifier worker: the target model, its sequences, and what each round decides.

A round goes through ``begin`` → ``verify`` → ``advance`` → ``fill``, each of which takes and returns values.
``runtime.verifier_loop`` calls them and moves the frames and messages in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from ...decoding.logprobs import token_logprobs
from ...decoding.trees.shape import ABSENT
from ...decoding.verify.draft_probs import DraftProbs
from ...errors import RequestError
from ...models.runner import ForwardRunner
from ...request.methods import Method
from ..policy.steering import Steering
from ..round.candidates import CandidateOrigin, Candidates
from ..round.frames import RowState
from ..round.lookup import Found
from ..round.roles import Arm, Roles
from ..round.round import Round
from ..round.times import RoundTimes
from ..round.verdict import Commit, Verdict
from ..sampling.selection import Selection
from ..sampling.slots import SlotSampling
from ..transport.messages import Admit, Scored, Submit
from .decider import Decider, Decision
from .forward_rows import ForwardRows
from .options import VerifierOptions
from .self_draft import SelfDraft
from .sequence import TargetSequence
from .slots import Slots


class Prefilled(NamedTuple):
    """The result of one step of prefill."""

    computed: bool
    """Whether a chunk was computed."""
    ended: list[TargetSequence]
    """Sequences that are over: no token is asked for, or ``error`` says why they cannot be decoded. They have left
    their slots."""
    scored: Scored | None
    """Log-probabilities of the chunk, where its request asks for them."""


class VerifierWorker:
    """Leads the rounds.

    Args:
        runner: of the target model.
        options: how to decode.
        sampling: the sampling parameters of the slots.
        decider: verifies trees, with the same runner and sampling.
        self_draft: drafts for sequences of method ``self``, if there are any.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        runner: ForwardRunner,
        options: VerifierOptions,
        *,
        sampling: SlotSampling,
        decider: Decider,
        self_draft: SelfDraft | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.runner, self.options, self.shape, self.clock = runner, options, options.shape, clock
        self.slots = Slots(runner, prefix_caching=options.prefix_caching)
        self.steering = Steering(
            governed=options.governed, ngram=options.ngram, jit=options.jit, lookaheads=options.lookaheads
        )
        self._sampling, self._decider, self._self_draft = sampling, decider, self_draft
        self._absent = [ABSENT] * (self.shape.nodes - 1)
        self._nothing = Candidates(tokens=self._absent)
        self._forward_rows = ForwardRows(runner, options, sampling, decider, self_draft=self_draft is not None)

    @property
    def padded(self) -> bool:
        """Whether all decode forwards have the same number of rows."""
        return self._forward_rows.padded

    def warm_up(self) -> None:
        """Compile every form that a round needs, and tell the policy what forwards cost."""
        own = self._self_draft
        for cost in self._forward_rows.warm_up():
            self.steering.calibrate(*cost)
            if own is not None:
                own.calibrate(cost.plain_s, cost.verify_s[self.shape.depth])
        if own is not None and self.runner.fuses:
            own.warm_up()

    def submit(self, message: Submit) -> None:
        """Queue a request. The front has checked it."""
        # A request for no tokens is of no concern to a draft.
        method: Method = (message.params.method or self.options.method) if message.params.max_tokens else "none"
        sequence = TargetSequence.of(message, method, self.options.max_model_len, self.options.ends)
        self.slots.prompts.waiting.append(sequence)

    def cancel(self, request: int) -> TargetSequence | None:
        """Forget a request. Its slot is free at once. Returns its sequence, if there was one."""
        if (slot := self.slots.find(request)) is None:
            return self.slots.prompts.forget(request)
        row = dict(self.slots.admitted)[slot]
        self._free(slot)
        return row

    def begin(self, round: Round, known: Mapping[int, Arm] | None) -> Round:
        """Start a round: give free slots to waiting requests and decide who speculates, and how.

        Args:
            round: the result of the last ``advance`` or ``fill``.
            known: requests that the draft knows, and their roles there; None while there is no draft.
        """
        self.slots.admit(lambda row: self._sampling.grammar_ready(row.params))
        admitted = self.slots.admitted
        requests: list[tuple[int, Method] | None] = [None] * self.runner.batch
        for slot, row in admitted:
            requests[slot] = row.request, "none" if self._beyond_draft(row) else row.method
        roles = self.steering.roles(requests, drafting=known is not None)
        told = known or {}
        introduced = {
            row.request: slot
            for slot, row in admitted
            if roles.speculates(slot) and told.get(row.request) != roles.arms[slot]
        }
        # The draft does not know the candidates of a sequence that it does not know.
        kept = {request: one for request, one in round.candidates.items() if request not in introduced}
        return Round(roles=roles, candidates=kept, introduced=tuple(introduced.values()))

    def _beyond_draft(self, row: TargetSequence) -> bool:
        limit = self.options.draft_limit
        return limit is not None and len(row.tokens) >= limit

    def introductions(self, round: Round) -> list[Admit]:
        """Messages that make sequences known to the draft."""
        return [
            row.introduction(slot, self.options.ends, forecasts=round.roles.forecasts(slot))
            for slot, row in self.slots.admitted
            if slot in round.introduced
        ]

    def known(self, roles: Roles) -> dict[int, Arm]:
        """Requests that the draft knows from now on, and their roles."""
        return {row.request: roles.arms[slot] for slot, row in self.slots.admitted if roles.speculates(slot)}

    def prefill(self) -> Prefilled:
        """Compute one chunk of the prompt that came first, so that running sequences never wait longer than that.
        Sequences whose prompt is complete decode from now on."""
        computed, complete, scored = self.slots.prompts.compute()
        ended = [row for slot, row in complete if not self._start(slot, row)]
        return Prefilled(computed, ended, scored)

    def _start(self, slot: int, row: TargetSequence) -> bool:
        """Let a sequence decode. False: it is over."""
        if row.error is not None or not row.params.max_tokens:
            self._free(slot)
            return False
        prompt, output = row.certain[: row.prompt_length], row.certain[row.prompt_length :]
        self.slots.rows[slot] = row
        try:
            ends = row.held_off(self.options.ends)
            row.constraint = self._sampling.process(slot, row.params, prompt=prompt, output=output, ends=ends)
            self._sampling.set(slot, row.params)
        except (RequestError, ValueError, OverflowError, RuntimeError) as error:
            # Whatever is wrong with one request's parameters ends that request and nothing else.
            row.error = str(error)
            self._free(slot)
            return False
        self.steering.start(row.request, row.certain)
        row.started_s = self.clock()
        return True

    def verify(self, round: Round) -> Verdict:
        """Run one target forward over the candidates and decide the outcomes. While nothing decodes, the verdict only
        says so."""
        if not self.slots.decoding:
            zeros = [0] * self.runner.batch
            return Verdict(nodes=zeros, bonus=zeros, states=self._prefilling(round.roles), commits=[], forward_s=0.0)
        selected, known, lengths = self._forward_rows.select(self.slots)
        rows = self.slots.rows
        candidates = [self._candidates(round, row) for row in rows]
        trees = [[ABSENT if row is None else row.root, *one.tokens] for row, one in zip(rows, candidates, strict=True)]
        origins: list[CandidateOrigin] = [one.origin for one in candidates]
        own = self._self_draft
        self_draft_s = own.fill(rows, trees, origins, lengths) if own is not None else 0.0
        plan = self._forward_rows.plan(self.slots, trees)
        longest = max(len(row.tokens) for row in rows if row is not None)
        decision = self._decider.decide(
            plan,
            self.runner.context_for(longest + max(plan.limits) + 1),
            lengths,
            [trees[slot] for slot in selected.slots],
            self._sampling.prepared(known, lengths),
            selected.index,
            [candidates[slot].drawn_from for slot in selected.slots],
        )
        states, commits = self._commit(round, trees, origins, selected, decision)
        ngram = self.steering.ngram
        self.steering.learn(commits, slots=selected.count, forward_s=decision.forward_s)
        return Verdict(
            nodes=self._by_slot(selected, decision.nodes),
            bonus=self._by_slot(selected, [max(token, 0) for token in decision.bonus]),
            states=states,
            commits=commits,
            forward_s=decision.forward_s,
            self_draft_s=self_draft_s,
            ngram=ngram,
            lookahead=self.steering.lookahead({row.method for row in rows if row is not None}),
        )

    def _candidates(self, round: Round, row: TargetSequence | None) -> Candidates:
        return self._nothing if row is None else round.candidates.get(row.request, self._nothing)

    def _by_slot(self, selected: Selection, values: list[int]) -> list[int]:
        """Values of the selected slots as values of all slots; 0 in the others."""
        if selected.index is None:
            return values
        whole = [0] * self.runner.batch
        for slot, value in zip(selected.slots, values, strict=True):
            whole[slot] = value
        return whole

    def _commit(
        self,
        round: Round,
        trees: list[list[int]],
        origins: list[CandidateOrigin],
        selected: Selection,
        decision: Decision,
    ) -> tuple[list[int], list[Commit]]:
        """Append the outcomes to the sequences, free the slots of those that end, and keep accepted siblings' keys.

        Args:
            trees: ``[B][W]`` of all slots, as ``origins`` is.
            decision: of the selected slots.

        Returns:
            states ``[B]`` for the draft, and a commit for each sequence that decodes.
        """
        states, commits, moves = self._prefilling(round.roles), list[Commit](), list[tuple[int, int, int]]()
        for index, slot in enumerate(selected.slots):
            if (row := self.slots.rows[slot]) is None:
                continue
            tree, node, chain, length = trees[slot], decision.nodes[index], self.shape.depth, len(row.tokens)
            depth, path = self.shape.depths[node], self.shape.path(node)
            drafted = chain - tree[1 : chain + 1].count(ABSENT)
            row.record.count_round(drafted=drafted, accepted=depth)
            tokens, finished = row.commit([tree[n] for n in path], decision.bonus[index])
            self._sampling.processors.commit(slot, tokens)
            logprobs = None
            if row.params.logprobs is not None:
                logprobs = token_logprobs(
                    decision.logits[index, [0, *path][: len(tokens)]], tokens, row.params.logprobs
                )
            commits.append(
                Commit(
                    request=row.request,
                    method=row.method,
                    slot=slot,
                    tokens=tokens,
                    accepted=min(depth, len(tokens)),
                    depth=depth,
                    drafted=drafted,
                    origin=origins[slot] if drafted or depth else "none",
                    hit=self._candidates(round, row).hit,
                    finished=finished,
                    error=row.error,
                    logprobs=logprobs,
                    record=row.record,
                    cached=row.reused,
                    started_s=row.started_s,
                )
            )
            if round.roles.speculates(slot):
                states[slot] = int(RowState.FINISHED if finished else RowState.ACTIVE)
            if finished:
                self._free(slot)
            elif node > chain:
                moves.append((slot, node - chain - 1, length + depth))
        if moves:
            slots, scratch, positions = (torch.tensor(column) for column in zip(*moves, strict=True))
            self.runner.keep(slots, scratch, positions)
        return states, commits

    def _prefilling(self, roles: Roles) -> list[int]:
        """States ``[B]`` that tell the draft to keep sequences whose prompt is not complete yet."""
        states = [int(RowState.EMPTY)] * self.runner.batch
        for slot in self.slots.prompts.filling:
            if roles.speculates(slot):
                states[slot] = int(RowState.PREFILL)
        return states

    def prepare(self) -> None:
        """Make the next verification's noise, which needs no candidates, while the draft may have to be waited for."""
        if self._sampling.params.random:
            selected = self._forward_rows.select(self.slots)
            self._sampling.prepare(selected.known, selected.lengths)

    def advance(self, round: Round, verdict: Verdict, found: Found | None) -> Round:
        """The round after a verdict. ``found``: the result of the lookup; None if no draft took part."""
        candidates, waiting, behind = dict[int, Candidates](), list[int](), set[int]()
        for slot, row in enumerate(self.slots.rows):
            if row is None:
                continue
            if found is not None and round.roles.speculates(slot):
                forecasts, prepared = round.roles.forecasts(slot), found.prepared[slot]
                if forecasts and not prepared:
                    behind.add(row.request)
                one = self._looked_up(slot, row, found, looked_up=forecasts and prepared)
                if one.origin == "none" and forecasts and verdict.ngram:
                    one = self._ngram(row, one)
                if one.origin == "none" and (self.options.jit or not forecasts):
                    waiting.append(slot)
                candidates[row.request] = one
            elif round.roles.arms[slot] == "ngram":
                candidates[row.request] = self._ngram(row, self._nothing)
            elif self._beyond_draft(row):
                behind.add(row.request)
        return Round(roles=round.roles, candidates=candidates, waiting=tuple(waiting), behind=frozenset(behind))

    def _looked_up(self, slot: int, row: TargetSequence, found: Found, *, looked_up: bool) -> Candidates:
        hit = found.branches[slot] is not None
        if looked_up:
            row.record.count_lookup(hit)
        return Candidates(
            tokens=found.trees[slot][1:],
            origin="prepared" if hit else "none",
            drawn_from=found.drawn_from(slot),
            hit=hit if looked_up else None,
        )

    def _ngram(self, row: TargetSequence, otherwise: Candidates) -> Candidates:
        """Candidates from the sequence's own text, where it says anything."""
        tokens = self.steering.propose(row.request)
        if not tokens:
            return otherwise
        return replace(otherwise, tokens=[*tokens, *self._absent[len(tokens) :]], origin="ngram", drawn_from=None)

    def fill(self, round: Round, trees: list[list[int]], drafted_from: DraftProbs | None, waited_s: float) -> Round:
        """The round with the candidates that were drafted for its waiting slots.

        Args:
            trees: ``[B][W - 1]``; ``ABSENT`` in slots for which nothing was drafted.
            drafted_from: ``[B, I, m]``, what they were drawn from, under rules that need it.
            waited_s: how long the rows waited.
        """
        self.steering.waited(waited_s)
        candidates, behind = dict(round.candidates), set(round.behind)
        for slot in round.waiting:
            if (row := self.slots.rows[slot]) is None:
                continue
            drawn_from = None if drafted_from is None else drafted_from[slot]
            before = candidates[row.request]
            candidates[row.request] = replace(before, tokens=trees[slot], origin="jit", drawn_from=drawn_from)
            if not round.roles.forecasts(slot) and trees[slot] == self._absent:
                behind.add(row.request)
        return replace(round, candidates=candidates, behind=frozenset(behind))

    def observe(self, following: Round, verdict: Verdict, times: RoundTimes, round_s: float, *, drafting: bool) -> None:
        """Take in how a round went.

        Args:
            following: the round after it.
            times: of its parts.
            round_s: from the end of the round before to its end.
            drafting: whether there is a draft. Without one it says nothing about speculation.
        """
        if drafting:
            draft_s, jit_s = times.draft_s or 0.0, times.jit_s or 0.0
            spent = {"seconds": round_s, "waited_s": times.waited_s, "draft_s": draft_s, "jit_s": jit_s}
            self.steering.observe(following, verdict, **spent)
        if self._self_draft is not None:
            self._self_draft.observe(verdict, round_s)

    def _free(self, slot: int) -> None:
        self.slots.free(slot)
        self._sampling.clear(slot)
