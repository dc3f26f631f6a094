"""Rounds without processes: verifier and draft worker driven in turn, every frame packed and unpacked.

What ``pipeline.loops`` does between two processes, step by step in one, and every round is seen:
where its tree came from, what was accepted, what was emitted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...pipeline.draft.worker import DraftWorker
from ...pipeline.round.frames import Next, OutcomeFrame
from ...pipeline.runtime.plan import Plan
from ...pipeline.transport.messages import Submit
from ...pipeline.verifier.worker import VerifierWorker
from ...request.params import SamplingParams

Source = Literal["none", "hit", "jit", "ngram"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One round of one request."""

    source: Source
    """Where the tree came from: prepared and looked up, drafted after a miss, the text itself, or there was none."""
    accepted: int
    tokens: tuple[int, ...]
    """What was emitted, the bonus token last."""


@dataclass(kw_only=True, slots=True)
class History:
    rounds: list[Round] = field(default_factory=list)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for one in self.rounds for token in one.tokens)


def play(
    verifier: VerifierWorker,
    draft: DraftWorker,
    plan: Plan,
    prompts: list[list[int]],
    params: list[SamplingParams],
) -> list[History]:
    """Run requests to their end; what happened to each, in order."""
    frames, histories = plan.frames(), [History() for _ in prompts]
    for request, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        verifier.submit(Submit(request=request, prompt=prompt, params=wanted))
    sources: list[Source] = ["none"] * len(verifier.rows)
    number = 0
    while not verifier.idle:
        verifier.admit()
        for told in verifier.introduce():
            draft.admit(told)
        verifier.prefill()
        slots = {row.request: slot for slot, row in enumerate(verifier.rows) if row is not None}
        prepared = draft.speculate()
        sent, _ = frames.unpack_speculation(frames.pack_speculation(prepared, number, 0), number)
        verdict = verifier.verify()
        for commit in verdict.commits:
            source = sources[slots[commit.request]]
            one = Round(source=source, accepted=commit.accepted, tokens=tuple(commit.tokens))
            histories[commit.request].rounds.append(one)
        outcome = OutcomeFrame(
            round=number,
            control_count=0,
            next=Next.ROUND,
            ngram=verdict.ngram,
            lookahead=verdict.lookahead,
            states=verdict.states,
            nodes=verdict.nodes,
            bonus=verdict.bonus,
        )
        outcome = frames.unpack_outcome(frames.pack_outcome(outcome), number)
        missed = verifier.advance(verdict, sent)
        hit = draft.commit(outcome, prepared)
        waits = draft.waiting(outcome.states, hit, jit=plan.jit)
        if missed != waits:
            raise RuntimeError("draft and verifier disagree about who missed")
        if any(waits):
            drafted = draft.draft_now(waits)
            raw = frames.pack_trees(drafted.trees, number, 0, drafted.draft)
            verifier.fill(missed, frames.unpack_trees(raw, number)[0], frames.unpack_tree_probs(raw))
        # What was served without waiting was prepared, or was an n-gram.
        sources = ["hit" if h else "jit" if w else "none" for h, w in zip(hit, waits, strict=True)]
        if verifier.steering.fallback is not None:
            for slot, source in verifier.steering.fallback.sources.items():
                sources[slot] = source
        number += 1
    return histories
