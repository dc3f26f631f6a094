"""Whatever is steered, however often: the tokens are those of plain decoding."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ssd import LLM, SamplingParams
from ssd.pipeline.policy.governor import ARMS, Arm, Governor, RoundResult
from ssd.pipeline.policy.pace import Pace
from ssd.pipeline.policy.steering import Steering
from ssd.pipeline.runtime.launch import InprocPipeline


@pytest.fixture
def wandering(monkeypatch: pytest.MonkeyPatch) -> set[Arm]:
    """Governors and paces that change their minds at random; which arms were taken."""
    taken: set[Arm] = set()
    draw = random.Random(4)

    def observe(self: Governor, round: RoundResult) -> None:
        taken.add(self.arm)
        if draw.random() < 0.5:
            self.arm = draw.choice(ARMS[ARMS.index(self.method) :])

    def drift(self: Pace, **_: Any) -> None:
        self.drafted = draw.random() < 0.6

    monkeypatch.setattr(Governor, "observe", observe)
    monkeypatch.setattr(Pace, "observe", drift)
    return taken


@pytest.mark.parametrize(
    ("verify", "siblings", "fallback", "lookahead", "numerics", "batch"),
    [
        ("coupled", 0, "auto", 3, "strict", 3),
        ("coupled", 1, "jit", "auto", "strict", 2),
        ("coupled", 0, "none", "auto", "fast", 1),
        ("rejection", 1, "auto", 3, "strict", 3),
    ],
)
def test_tokens_do_not_depend_on_the_arm(
    verify: str,
    siblings: int,
    fallback: str,
    lookahead: int | str,
    numerics: str,
    batch: int,
    wandering: set[Arm],
    tiny_config: Callable[..., dict[str, Any]],
) -> None:
    speculation = {
        "lookahead": lookahead,
        "siblings": siblings,
        "fallback": fallback,
        "verify": verify,
        "governor": True,
        "forecast": {"budget": 6},
    }
    config = tiny_config(engine={"max_batch": batch}, speculation=speculation) | {"numerics": numerics}
    prompts = [[5, 6, 7, 8] * 5, [9, 9, 9, 4, 5], list(range(20, 50))]
    temperatures = (0.0, 0.9) if verify == "coupled" else (0.0,)
    with LLM(config, launch=InprocPipeline) as llm:
        for temperature in temperatures:
            params = [SamplingParams(max_tokens=45, temperature=temperature, seed=s, ignore_eos=True) for s in range(3)]
            outputs = {
                method: llm.generate(prompts, [replace(one, method=method) for one in params])
                for method in ("none", "ssd", "sd")
            }
            assert llm.degraded is None
            for method in ("ssd", "sd"):
                for one, plain in zip(outputs[method], outputs["none"], strict=True):
                    assert one.token_ids == plain.token_ids
    assert wandering == set(ARMS)
    assert sum(one.speculation.accepted for one in outputs["ssd"]) > 5


def test_each_number_of_slots_has_governors_of_its_own() -> None:
    """What four slots taught says nothing of one; what n-grams bring is the text's, and known to both."""
    steering = Steering(governed=True, ngram=False, jit=True, lookaheads=(3,))
    for slots, plain_s in ((1, 0.009), (4, 0.003)):
        steering.calibrate(slots, plain_s, {3: 0.010})
    one, four = (steering._by_slots[slots]["ssd"] for slots in (1, 4))
    assert (one.share, four.share) == pytest.approx((0.9, 0.3))
    four.arm = "none"
    for slots, arm in ((4, "none"), (1, "ssd")):
        steering.learn([], slots=slots, forward_s=0.01)
        assert steering.roles([(0, "ssd"), None], drafting=True).arms == (arm, "none")
    four.count_ngrams(6, 2)
    one.observe(RoundResult(tokens=1, rows=1, seconds=0.012, forward_s=0.010))
    assert one.rates()["ngram"] == pytest.approx(3 / 0.012)
