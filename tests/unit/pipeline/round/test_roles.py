"""Who speculates is decided once a round: draft and verifier never disagree, whatever changes meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from ssd import SamplingParams
from ssd.config.load import load_config
from ssd.pipeline.policy.governor import ARMS
from ssd.pipeline.policy.steering import Steering
from ssd.pipeline.round.round import Round
from ssd.pipeline.runtime.build_draft import build_draft
from ssd.pipeline.runtime.build_verifier import build_verifier
from ssd.pipeline.runtime.plan import Plan
from ssd.pipeline.verifier.worker import VerifierWorker
from ssd.testing.twins.rounds import play

PROMPTS = [[9, 30, 77], [5, 6, 7], [5, 6, 5, 6, 5, 6], [1, 2]]


def greedy(method: str, count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True, method=method)  # type: ignore[arg-type]


@pytest.mark.parametrize("fallback", ["jit", "none", "auto"])
def test_a_policy_that_changes_its_mind_in_mid_round(
    fallback: str, tiny_config: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The governors choose other arms between any two steps of a round, and for every number of slots."""
    speculation = {"lookahead": 3, "governor": True, "fallback": fallback}
    config = load_config(tiny_config(engine={"max_batch": 4}, speculation=speculation))
    plan = Plan(config=config, vocabulary=128, ends=())
    draw, seen = random.Random(2), set()

    def scramble(steering: Steering) -> None:
        for governors in steering._by_slots.values():
            for method, governor in governors.items():
                governor.arm = draw.choice(ARMS[ARMS.index(method) :])  # type: ignore[arg-type]

    def changing(step: Callable[..., Any]) -> Callable[..., Any]:
        def changed(self: VerifierWorker, round: Round, *rest: Any) -> Any:
            scramble(self.steering)
            done = step(self, round, *rest)
            scramble(self.steering)
            seen.update(round.roles.arms)
            return done

        return changed

    for step in ("verify", "advance"):
        monkeypatch.setattr(VerifierWorker, step, changing(getattr(VerifierWorker, step)))
    params = [greedy(method, 20 + 7 * i) for i, method in enumerate(["ssd", "sd", "ssd", "ssd"])]
    verifier, draft = build_verifier(plan)[0], build_draft(plan)[0]
    changed = play(verifier, draft, plan, PROMPTS, params)  # raises where the two disagree about who waits
    assert seen == set(ARMS)
    plain = play(verifier, draft, plan, PROMPTS, [greedy("none", one.max_tokens) for one in params])
    assert [one.tokens for one in changed] == [one.tokens for one in plain]
