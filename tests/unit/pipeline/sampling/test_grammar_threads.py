"""Grammars are compiled beside the rounds: one that takes long holds up its own request only."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ssd import SamplingParams
from ssd.config.load import load_config
from ssd.engine.front import make_plan
from ssd.grammars import compiler
from ssd.grammars.compiler import Grammars
from ssd.pipeline.draft.worker import DraftWorker
from ssd.pipeline.runtime.build_draft import build_draft
from ssd.pipeline.runtime.build_verifier import build_verifier
from ssd.pipeline.runtime.plan import Plan
from ssd.pipeline.transport.messages import Submit
from ssd.pipeline.verifier.worker import VerifierWorker
from ssd.testing.twins.rounds import decode_alone, play

PLAIN = SamplingParams(max_tokens=20, ignore_eos=True, method="none")
ASKED = SamplingParams(max_tokens=30, structured_outputs={"regex": "[a-f]{24}"})  # type: ignore[arg-type]
SOON_S = 30.0


@pytest.fixture
def plan(tiny_config: Callable[..., dict[str, Any]]) -> Plan:
    return make_plan(load_config(tiny_config(engine={"max_batch": 2})))[1]


def decoded(verifier: VerifierWorker, requests: list[SamplingParams], during: Callable[[dict[int, list[int]]], None]):
    tokens: dict[int, list[int]] = {number: [] for number in range(len(requests))}
    for number, params in enumerate(requests):
        verifier.submit(Submit(request=number, prompt=[9, 30, 77], params=params))
    for verdict in decode_alone(verifier):
        for commit in verdict.commits:
            tokens[commit.request] += commit.tokens
        during(tokens)
    return tokens


def test_other_requests_decode_meanwhile(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(ASKED, method="none")
    expected = decoded(build_verifier(plan)[0], [asked, PLAIN], lambda _: None)
    compile_, gate = Grammars._compile, threading.Event()

    def slow(self: Grammars, wanted: Any) -> Any:
        assert gate.wait(SOON_S)
        return compile_(self, wanted)

    monkeypatch.setattr(Grammars, "_compile", slow)

    def open_at_the_end_of_the_other(tokens: dict[int, list[int]]) -> None:
        if len(tokens[1]) == PLAIN.max_tokens and not gate.is_set():
            assert not tokens[0]
            gate.set()

    # The slow one came first; the other one did not wait for it.
    assert decoded(build_verifier(plan)[0], [asked, PLAIN], open_at_the_end_of_the_other) == expected


@pytest.mark.parametrize("rounds", [0, 3])
def test_a_draft_guesses_without_a_grammar_until_it_is_there(
    rounds: int, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier, draft = build_verifier(plan)[0], build_draft(plan)[0]
    [expected] = play(verifier, draft, plan, [[9, 30, 77]], [replace(ASKED, method="none")])
    ready, calls, seen = draft.sampling.grammars.ready, itertools.count(), []  # type: ignore[union-attr]

    def late(wanted: Any) -> bool:
        return next(calls) >= rounds and (draft.sampling.grammars.matcher(wanted), ready(wanted))[1]  # type: ignore[union-attr]

    monkeypatch.setattr(draft.sampling.grammars, "ready", late)
    commit = DraftWorker.commit

    def noting(self: DraftWorker, *given: Any) -> Any:
        done = commit(self, *given)
        seen.extend(row.constraint is not None for row in self.rows if row is not None)
        return done

    monkeypatch.setattr(DraftWorker, "commit", noting)
    [found] = play(verifier, draft, plan, [[9, 30, 77]], [replace(ASKED, method="ssd")])
    assert found.tokens == expected.tokens
    assert seen[-1] and seen.index(True) == max(0, rounds - 1)


def test_more_grammars_than_are_kept_may_wait(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking whether one is ready never throws away another that is waited for."""
    monkeypatch.setattr(compiler, "KEPT", 2)
    compiled: list[str | None] = []
    compile_ = Grammars._compile
    monkeypatch.setattr(Grammars, "_compile", lambda self, one: (compiled.append(one.regex), compile_(self, one))[1])
    asked = [
        SamplingParams(max_tokens=3, method="none", structured_outputs={"regex": f"[a-f]{{24}}{n}"})  # type: ignore[arg-type]
        for n in range(8)
    ]
    tokens = decoded(build_verifier(plan)[0], asked, lambda _: None)
    assert all(len(got) == 3 for got in tokens.values())
    assert sorted(compiled, key=str) == sorted({str(params.structured_outputs.regex) for params in asked})  # type: ignore[union-attr]
