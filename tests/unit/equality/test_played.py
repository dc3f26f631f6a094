"""Both workers in one thread, every round seen: the tokens, and how often the draft is right, for
mistakes that cost only speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssd import SamplingParams
from ssd.config.load import load_config
from ssd.decoding.trees.shape import ABSENT
from ssd.pipeline.draft.worker import DraftWorker
from ssd.pipeline.round.frames import SpeculationSet
from ssd.pipeline.runtime.build_draft import build_draft
from ssd.pipeline.runtime.build_verifier import build_verifier
from ssd.pipeline.runtime.plan import Plan
from ssd.request.methods import Method
from ssd.testing.twins.rounds import History, play

Configure = Callable[..., dict[str, Any]]

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
PARAMS = [
    replace(GREEDY, temperature=1.2, seed=3),
    GREEDY,
    replace(GREEDY, temperature=0.7, top_p=0.9, seed=5),
    replace(GREEDY, temperature=1.0, top_k=9, seed=6),
]
ASKED = [[9, 30, 77], list(range(20, 44)), [5, 100], [60, 61, 62, 63, 64]]


def played(config: dict[str, Any], method: Method = "ssd") -> list[History]:
    """More requests than slots, every round seen."""
    plan = Plan(config=load_config(config), vocabulary=128, ends=())
    verifier, draft = build_verifier(plan)[0], build_draft(plan)[0]
    return play(verifier, draft, plan, ASKED, [replace(p, method=method) for p in PARAMS])


def test_tokens_are_plain_decodings(tiny_config: Configure) -> None:
    config = tiny_config(engine={"max_batch": 2}, speculation={"siblings": 2, "forecast": {"budget": 14}})
    plain, *speculative = (played(config, method) for method in ("none", "ssd", "sd"))
    for histories in speculative:
        assert [history.tokens for history in histories] == [history.tokens for history in plain]
        rounds = [one for history in histories for one in history.rounds]
        # It had something to be wrong about, and siblings to accept.
        assert {0, 1, 3} <= {one.accepted for one in rounds}


def test_a_draft_that_is_the_target_is_never_wrong(tiny_config: Configure) -> None:
    """Every candidate is accepted and every outcome was forecast: the draft computes what the
    target computes, with the same noise, filters and keys, in glue and branches alike."""
    fixed = {"shape": "uniform", "budget": 7}  # a guess after every node, however unlikely
    config = tiny_config(draft="target", engine={"max_batch": 2}, speculation={"siblings": 1, "forecast": fixed})
    for history in played(config):
        first, second, *others = history.rounds
        # Nothing is drafted for the first round; what comes after it is forecast like any other.
        assert (first.source, first.accepted, second.source) == ("none", 0, "hit")
        assert {one.source for one in others} == {"hit"}
        assert all(one.accepted == min(3, len(one.tokens)) for one in (second, *others))


def test_guesses_are_possible_outcomes(tiny_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """No branch is spent on an outcome that cannot be (the bonus token after u is no child of u),
    nor on one that has a branch already; and the forecast finds what is likely."""
    speculate, seen = DraftWorker.speculate, []

    def noting(self: DraftWorker) -> SpeculationSet:
        trees = [*self.trees]
        found = speculate(self)
        for row, tree in enumerate(trees):
            pairs = list(zip(found.nodes[row].tolist(), found.guesses[row].tolist(), strict=True))
            if pairs[0][1] != ABSENT:
                seen.append(pairs)
                assert len(set(pairs)) == len(pairs)
                for node, guess in pairs:
                    assert guess not in [tree[child] for child in self.shape.children(node)]
        return found

    monkeypatch.setattr(DraftWorker, "speculate", noting)
    histories = played(tiny_config(engine={"max_batch": 2}, speculation={"siblings": 1, "forecast": {"budget": 14}}))
    assert len(seen) > 10 and torch.tensor([len(pairs) for pairs in seen]).unique().tolist() == [14]
    sources = [one.source for history in histories for one in history.rounds[1:]]
    assert sources.count("hit") > len(sources) / 2
