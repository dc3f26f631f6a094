"""Rounds without processes: verifier and draft worker driven in turn, every frame packed and unpacked.

The steps of ``pipeline.runtime``'s two loops in one process, with every round on record: where its candidates came
from, what was accepted, what was emitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ...pipeline.draft.worker import DraftWorker
from ...pipeline.round.candidates import CandidateOrigin
from ...pipeline.round.lookup import lookup
from ...pipeline.round.roles import Arm
from ...pipeline.round.round import Round
from ...pipeline.round.verdict import Verdict
from ...pipeline.runtime.plan import Plan
from ...pipeline.transport.messages import Submit
from ...pipeline.verifier.worker import VerifierWorker
from ...request.sampling_params import SamplingParams

Source = Literal["none", "hit", "jit", "ngram"]
SOURCES: dict[CandidateOrigin, Source] = {"none": "none", "prepared": "hit", "jit": "jit", "ngram": "ngram"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlayedRound:
    """One round of one request."""

    source: Source
    """Where the candidates came from: the speculation set, a draft after a miss, the text itself, or nowhere."""
    accepted: int
    tokens: tuple[int, ...]
    """The emitted tokens, the bonus token last."""


@dataclass(kw_only=True, slots=True)
class History:
    rounds: list[PlayedRound] = field(default_factory=list)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for one in self.rounds for token in one.tokens)


def decode_alone(verifier: VerifierWorker) -> Iterator[Verdict]:
    """Run rounds without a draft until nothing is left to decode. Yields each verdict before the next round."""
    round = Round.empty(verifier.runner.batch)
    while not verifier.slots.idle:
        round = verifier.begin(round, None)
        verifier.prefill()
        verdict = verifier.verify(round)
        round = verifier.advance(round, verdict, None)
        yield verdict


def play(
    verifier: VerifierWorker,
    draft: DraftWorker,
    plan: Plan,
    prompts: list[list[int]],
    params: list[SamplingParams],
) -> list[History]:
    """Run requests to their end.

    Returns:
        what happened to each, in the order of ``prompts``.

    Raises:
        RuntimeError: draft and verifier disagree about which rows wait.
    """
    frames, histories = plan.frames(), [History() for _ in prompts]
    for request, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        verifier.submit(Submit(request=request, prompt=prompt, params=wanted))
    round, known = Round.empty(verifier.runner.batch), dict[int, Arm]()
    number = 0
    while not verifier.slots.idle:
        round = verifier.begin(round, known)
        for told in verifier.introductions(round):
            draft.admit(told)
        known = verifier.known(round.roles)
        verifier.prefill()
        prepared = draft.speculate()
        sent, _ = frames.unpack_speculation(frames.pack_speculation(prepared, number, 0), number)
        verdict = verifier.verify(round)
        for commit in verdict.commits:
            one = PlayedRound(source=SOURCES[commit.origin], accepted=commit.accepted, tokens=tuple(commit.tokens))
            histories[commit.request].rounds.append(one)
        outcome = frames.unpack_outcome(frames.pack_outcome(verdict.outcome(number, 0)), number)
        round = verifier.advance(round, verdict, lookup(verdict.nodes, verdict.bonus, sent))
        waits = draft.waiting(outcome.states, draft.commit(outcome, prepared), jit=plan.jit)
        if round.waiting != tuple(slot for slot, waiting in enumerate(waits) if waiting):
            raise RuntimeError("draft and verifier disagree about who missed")
        if any(waits):
            drafted = draft.draft_now(waits)
            raw = frames.pack_trees(drafted.trees, number, 0, drafted.draft)
            trees, drafted_from = frames.unpack_trees(raw, number)[0], frames.unpack_tree_probs(raw)
            round = verifier.fill(round, trees, drafted_from, waited_s=0.0)
        number += 1
    return histories
