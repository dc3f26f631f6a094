"""How far to draft: the choice against pipelines whose times and acceptances are known, and that tokens do
not depend on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ssd import LLM, SamplingParams
from ssd.config.load import load_config
from ssd.errors import ConfigError
from ssd.pipeline.policy.lookahead import DWELL, LookaheadChooser, first_lookahead, lookahead_tiers
from ssd.pipeline.runtime.launch import InprocPipeline

REST_S, STEP_S = 0.0005, 0.001


def drive(
    chooser: LookaheadChooser, rounds: int, *, accepts: float, forward_s: float, misses: float = 0.2, seed: int = 0
) -> float:
    """Tokens per second of rounds in which every drafted token is accepted with the same chance."""
    draw, tokens, spent = random.Random(seed), 0, 0.0
    for _ in range(rounds):
        depth = chooser.current
        accepted = 0
        while accepted < depth and draw.random() < accepts:
            accepted += 1
        chooser.learn(accepted, depth)
        draft_s = STEP_S * (depth + 1) * draw.uniform(0.9, 1.3)
        wait_s = STEP_S * depth if draw.random() < misses else 0.0
        took = forward_s * draw.uniform(0.95, 1.2)
        seconds = REST_S + max(took, draft_s) + wait_s
        chooser.observe(seconds=seconds, forward_s=took, draft_s=draft_s, wait_s=wait_s)
        tokens, spent = tokens + accepted + 1, spent + seconds
    return tokens / spent


def fixed(tier: int, **pipeline: float) -> float:
    return drive(LookaheadChooser((tier,)), 4000, **pipeline)


def test_tiers() -> None:
    assert lookahead_tiers(5) == (1, 2, 3, 5)
    assert lookahead_tiers(7) == (1, 2, 3, 5, 7)
    assert lookahead_tiers(4) == (1, 2, 3, 4)
    assert lookahead_tiers(1) == (1,)
    assert [first_lookahead(lookahead_tiers(deepest)) for deepest in (1, 2, 3, 8)] == [1, 2, 3, 3]


def test_a_bad_draft_drafts_one_token_and_a_perfect_one_all() -> None:
    bad, perfect = LookaheadChooser(lookahead_tiers(7)), LookaheadChooser(lookahead_tiers(7))
    drive(bad, 600, accepts=0.02, forward_s=0.003)
    drive(perfect, 600, accepts=1.0, forward_s=0.008)
    assert (bad.current, perfect.current) == (1, 7)


@pytest.mark.parametrize("accepts", [0.3, 0.5, 0.7, 0.85, 0.95])
@pytest.mark.parametrize("forward_s", [0.001, 0.004, 0.02])
def test_near_the_best_without_flapping(accepts: float, forward_s: float) -> None:
    tiers = lookahead_tiers(7)
    best = max(fixed(tier, accepts=accepts, forward_s=forward_s) for tier in tiers)
    chooser = LookaheadChooser(tiers)
    drive(chooser, 500, accepts=accepts, forward_s=forward_s, seed=1)
    chooser.changes = 0
    assert drive(chooser, 4000, accepts=accepts, forward_s=forward_s, seed=2) > 0.95 * best
    assert chooser.changes <= 4000 / DWELL / 6


def test_it_follows_a_change() -> None:
    chooser = LookaheadChooser(lookahead_tiers(7))
    drive(chooser, 1000, accepts=0.05, forward_s=0.008)
    assert chooser.current == 1
    drive(chooser, 1500, accepts=0.98, forward_s=0.008)
    assert chooser.current == 7


def test_rows_that_cost_count() -> None:
    """A verification that takes longer the more rows it has is not made deep for little."""
    tiers = lookahead_tiers(7)
    flat, steep = LookaheadChooser(tiers), LookaheadChooser(tiers, {tier: 1.0 + tier for tier in tiers})
    for chooser in (flat, steep):
        for number in range(400):
            chooser.learn(min(chooser.current, (2, 7, 3, 0)[number % 4]), chooser.current)
            forward_s = 0.01 if chooser is flat else 0.002 * (1 + chooser.current)
            chooser.observe(seconds=forward_s + 0.001, forward_s=forward_s, draft_s=0.001, wait_s=0.0)
    assert steep.current < flat.current == 7


def test_auto_needs_a_forecast_that_follows() -> None:
    with pytest.raises(ConfigError, match="lookahead=auto needs a forecast"):
        load_config("embedded", ["speculation.lookahead=auto", "speculation.forecast.shape=uniform"])
    config = load_config("embedded", ["speculation.lookahead=auto", "speculation.lookahead_max=6"])
    assert config.speculation.depth == 6
    assert load_config("embedded", ["speculation.lookahead=2"]).speculation.depth == 2
    with pytest.raises(ConfigError, match="lookahead must be an integer from 0 to 16 or auto"):
        load_config("embedded", ["speculation.lookahead=17"])


@pytest.fixture
def wandering(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """A chooser that changes its mind every round, at random; which lookaheads it chose."""
    chosen: set[int] = set()
    draw = random.Random(3)

    def current(self: LookaheadChooser) -> int:
        chosen.add(tier := draw.choice(self.tiers))
        return tier

    monkeypatch.setattr(LookaheadChooser, "current", property(current, lambda self, value: None), raising=False)
    return chosen


CASES = [
    ("coupled", 0, "jit", "strict", 1),
    ("coupled", 1, "auto", "strict", 3),
    ("coupled", 0, "none", "fast", 3),
    ("coupled", 0, "auto", "fast", 1),
    ("rejection", 1, "jit", "strict", 2),
    ("block", 0, "auto", "strict", 2),
]


@pytest.mark.parametrize(("verify", "siblings", "fallback", "numerics", "batch"), CASES)
def test_tokens_do_not_depend_on_it(
    verify: str,
    siblings: int,
    fallback: str,
    numerics: str,
    batch: int,
    wandering: set[int],
    tiny_config: Callable[..., dict[str, Any]],
) -> None:
    speculation = {
        "lookahead": "auto",
        "lookahead_max": 5,
        "siblings": siblings,
        "fallback": fallback,
        "verify": verify,
        "forecast": {"budget": 9},
    }
    config = tiny_config(engine={"max_batch": batch}, speculation=speculation) | {"numerics": numerics}
    prompts = [[5, 6, 7, 8] * 5, [9, 9, 9, 4, 5], list(range(20, 50))]
    # Rules that compare probabilities give plain decoding's tokens at temperature 0 only.
    temperatures = (0.0, 0.9) if verify == "coupled" else (0.0,)
    with LLM(config, launch=InprocPipeline) as llm:
        for temperature in temperatures:
            params = [SamplingParams(max_tokens=30, temperature=temperature, seed=s, ignore_eos=True) for s in range(3)]
            outputs = {}
            for method in ("none", "ssd", "sd"):
                outputs[method] = llm.generate(prompts, [replace(one, method=method) for one in params])
            assert llm.degraded is None
            for method in ("ssd", "sd"):
                for one, plain in zip(outputs[method], outputs["none"], strict=True):
                    assert one.token_ids == plain.token_ids
        if verify != "coupled":  # the law is another matter; here, that nothing breaks while it samples
            sampled = SamplingParams(max_tokens=30, temperature=0.9, ignore_eos=True)
            assert all(len(one.token_ids) == 30 for one in llm.generate(prompts, sampled))
    assert wandering == {1, 2, 3, 5}
    assert sum(one.speculation.accepted for one in outputs["ssd"]) > 5
