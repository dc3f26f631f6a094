"""A profile measured on tiny models: the replay is what really happened, the fits are the lines behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ssd import LLM, SamplingParams
from ssd.bench.calibrate import Size, fit, measure
from ssd.bench.profile import Point, Replay
from ssd.bench.prompts import Prompt
from ssd.bench.replay import replay
from ssd.bench.simulate import Setting, simulate
from ssd.config import load_config
from ssd.engine.front import make_plan
from ssd.pipeline.build import build_draft, build_verifier
from ssd.pipeline.launch import InprocPipeline
from ssd.testing.rounds import play

Configure = Callable[..., dict[str, Any]]
TOKENS = 30


@pytest.mark.parametrize(("temperature", "rows", "shape"), [(0.0, 4, "confidence"), (1.0, 8, "uniform")])
def test_a_replay_is_what_happens(temperature: float, rows: int, shape: str, tiny_config: Configure) -> None:
    speculation = {"lookahead": 3, "rows": rows, "forecast": {"budget": 8, "shape": shape}}
    config = load_config(tiny_config(speculation=speculation))
    plan = make_plan(config)[1]
    prompt = torch.randint(4, 128, (9,), generator=torch.Generator().manual_seed(3)).tolist()
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=TOKENS, ignore_eos=True)
    (history,) = play(build_verifier(plan)[0], build_draft(plan)[0], plan, [prompt], [params])
    found = replay(plan, [(prompt, history.tokens)], params, lookaheads=(1, 3, 5), rows=(8,), budgets=(4, 8))
    # Left out of both: the first round (its root alone) and the end, which the replay does not judge.
    position, compared = len(history.rounds[0].tokens), 0
    for now, after in zip(history.rounds[1:], history.rounds[2:], strict=False):
        accepted = found.accepted[f"3:{rows}"][0]
        if position >= len(accepted):
            break
        assert accepted[position] == now.accepted
        assert (0 < found.needed[f"3:{rows}"][0][position] <= 8) == (after.source == "hit")
        position += len(now.tokens)
        compared += 1
    assert compared > 5
    # And so is what the simulator makes of it.
    assert {tree for tree in found.trees} == {(1, 2), (3, 4), (3, 8), (5, 6), (5, 8)}


def test_a_measured_profile_simulates(tiny_config: Configure) -> None:
    config = load_config(tiny_config(engine={"max_batch": 1}))
    prompts = [Prompt(name="a", text="the cat"), Prompt(name="b", text="a long road")]
    sizes = (Size(lookahead=2, budget=3), Size(lookahead=4, budget=9))
    said: list[str] = []
    profile = measure(
        config,
        prompts,
        name="tiny",
        sizes=sizes,
        lookaheads=(2, 4),
        rows=(),
        temperatures=(0.0,),
        max_tokens=12,
        launch=lambda c: LLM(c, launch=InprocPipeline),
        say=said.append,
    )
    assert len(profile.points) == len(sizes) * 4
    assert set(profile.costs) == set(profile.content) == {"0"}
    assert list(profile.costs["0"].target) == [1, 3, 5]
    assert isinstance(profile.content["0"], Replay) and profile.content["0"].texts == 2
    assert [len(text) for text in profile.content["0"].accepted["4:5"]] == [12, 12]
    for setting in (Setting(lookahead=4, budget=8), Setting(method="sd", lookahead=2), Setting(method="none")):
        assert 1 < simulate(profile, setting, tokens=200).tokens_per_second < 1e4
    assert len(said) == len(sizes) * 5 + 1


def points(tree: Callable[[int, int], float]) -> list[Point]:
    found = []
    for depth, budget, beside in ((2, 4, 0), (4, 4, 0), (4, 16, 0), (8, 8, 1)):
        common: dict[str, Any] = {"temperature": 0.0, "lookahead": depth, "budget": budget}
        common |= {"batch": 1, "rounds": 9}
        for method in ("none_fast", "none", "sd", "ssd"):
            rows = 1 if method == "none_fast" else 1 + depth * (1 + beside)
            found.append(
                Point(
                    method=method,  # type: ignore[arg-type]
                    rows=rows,
                    forward_s=1.0 + 0.1 * rows,
                    draft_s={"ssd": tree(depth, budget), "sd": 0.25}.get(method),
                    jit_s=0.5 + 0.25 * depth if method in ("sd", "ssd") else None,
                    overhead_s={"sd": 0.2, "ssd": 0.3}.get(method, 0.1),
                    after_wait_s=0.05 if method == "ssd" else None,
                    **common,
                )
            )
    return found


def test_fits_find_the_lines() -> None:
    costs = fit(points(lambda depth, budget: 0.4 + 0.3 * depth + 0.01 * depth * budget))
    assert costs.target == pytest.approx({1: 1.1, 3: 1.3, 5: 1.5, 17: 2.7})
    assert (costs.tree.base, costs.tree.per_step, costs.tree.per_row) == pytest.approx((0.4, 0.3, 0.01))
    assert (costs.jit.base, costs.jit.per_step) == pytest.approx((0.5, 0.25))
    assert costs.overhead == pytest.approx({"none": 0.1, "sd": 0.2, "ssd": 0.3})
    assert (costs.glue, costs.after_wait) == pytest.approx((0.25, 0.05))


def test_fits_have_no_negative_coefficients() -> None:
    costs = fit(points(lambda depth, budget: 1.0 + 0.2 * depth - 0.001 * depth * budget))
    assert costs.tree.per_row == 0
    assert costs.tree.seconds(4, 8) == pytest.approx(1.8, rel=0.1)
