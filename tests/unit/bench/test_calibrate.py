"""A profile measured on tiny models: the replay is what really happened, the fits are the lines behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ssd import LLM, SamplingParams
from ssd.bench.measure.prompts import Prompt
from ssd.bench.simulate.calibrate import Calibration, Size, fit, measure, point, steadied
from ssd.bench.simulate.profile import Point, Replay
from ssd.bench.simulate.replay import replay
from ssd.bench.simulate.simulator import Setting, simulate
from ssd.config.load import load_config
from ssd.engine.front import make_plan
from ssd.pipeline.runtime.build_draft import build_draft
from ssd.pipeline.runtime.build_verifier import build_verifier
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.transport.messages import RoundReport
from ssd.testing.twins.rounds import play

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
    options = Calibration(sizes=sizes, lookaheads=(2, 4), rows=(), temperatures=(0.0,), max_tokens=12)
    profile = measure(lambda c: LLM(c, launch=InprocPipeline), config, prompts, options, name="tiny", say=said.append)
    assert len(profile.points) == len(sizes) * 4
    assert set(profile.costs) == set(profile.content) == {"0"}
    assert list(profile.costs["0"].target) == [1, 3, 5]
    assert isinstance(profile.content["0"], Replay) and profile.content["0"].texts == 2
    assert [len(text) for text in profile.content["0"].accepted["4:5"]] == [12, 12]
    for setting in (Setting(lookahead=4, budget=8), Setting(method="sd", lookahead=2), Setting(method="none")):
        assert 1 < simulate(profile, setting, tokens=200).tokens_per_second < 1e4
    assert len(said) == len(sizes) * 2 + 1
    assert not profile.padded and [one.start for one in profile.points] == [1] * 4 + [2] * 4


def points(tree: Callable[[int, int, int], float]) -> list[Point]:
    """Of pipelines whose draft's half is a function of K, N and the tree's rows."""
    found = []
    for start, (depth, budget, beside) in enumerate(((2, 4, 0), (4, 4, 0), (4, 16, 0), (8, 8, 1))):
        common: dict[str, Any] = {"temperature": 0.0, "lookahead": depth, "budget": budget}
        common |= {"batch": 1, "rounds": 9}
        for method in ("none_fast", "none", "sd", "ssd"):
            rows = 1 if method in ("none", "none_fast") else 1 + depth * (1 + beside)
            found.append(
                Point(
                    method=method,  # type: ignore[arg-type]
                    rows=rows,
                    forward_s=1.0 + 0.1 * rows,
                    draft_s={"ssd": tree(depth, budget, rows), "sd": 0.25}.get(method),
                    jit_s={"sd": 0.7 + 0.25 * depth, "ssd": 0.5 + 0.25 * depth}.get(method),
                    overhead_s={"sd": 0.2 + 0.01 * depth, "ssd": 0.3 + 0.01 * depth}.get(method, 0.1),
                    exchange_s=-0.02 if method == "ssd" and depth == 8 else None,
                    after_wait_s=0.05 if method == "ssd" else None,
                    start=start,
                    **common,
                )
            )
    return found


def test_fits_find_the_lines() -> None:
    costs = fit(points(lambda depth, budget, rows: 0.4 + 0.05 * rows + 0.3 * depth + 0.01 * depth * budget), 0.0)
    assert costs.target == pytest.approx({1: 1.1, 3: 1.3, 5: 1.5, 17: 2.7})
    tree = costs.tree
    assert (tree.base, tree.per_node, tree.per_step, tree.per_row) == pytest.approx((0.4, 0.05, 0.3, 0.01))
    assert (costs.jit.base, costs.jit.per_step) == pytest.approx((0.5, 0.25))
    assert costs.sd is not None and (costs.sd.base, costs.sd.per_step) == pytest.approx((0.7, 0.25))
    assert costs.overhead == pytest.approx({"none": 0.1, "sd": 0.2, "ssd": 0.3})
    assert costs.per_position == pytest.approx(0.01)
    assert (costs.glue, costs.after_wait, costs.exchange) == pytest.approx((0.25, 0.05, -0.02))


def test_a_machine_that_changes_its_speed_is_corrected_by_its_plain_decoding() -> None:
    steady = points(lambda depth, budget, rows: 0.4 + 0.05 * rows + 0.3 * depth + 0.01 * depth * budget)
    slower = {0: 1.0, 1: 2.0, 2: 0.5, 3: 1.0}

    def seen(one: Point) -> Point:
        return one.model_copy(update={name: s * slower[one.start] for name, s in one if name.endswith("_s") and s})

    assert fit(steadied([seen(one) for one in steady]), 0.0) == fit(steady, 0.0)


def test_a_forward_after_a_wait_for_the_draft_counts_only_beyond_the_others() -> None:
    changed = {4: 9.0, 8: 5.0}  # of lookahead 4 and 8
    late = [
        one.model_copy(update={"overhead_s": None, "forward_s": changed[one.lookahead]})
        if one.method == "ssd" and one.lookahead in changed and one.budget != 16
        else one
        for one in points(lambda *_: 1.0)
    ]
    assert fit(late, 0.0).target == pytest.approx({1: 1.1, 3: 1.3, 5: 1.5, 17: 5.0})


def test_further_sequences_add_to_a_forward() -> None:
    """What they add shows in plain decoding; rows of a batch that one sequence had too are the sequence's."""
    base = next(one for one in points(lambda *_: 1.0) if one.method == "none_fast")
    several = {"batch": 4, "start": 9}
    plain = base.model_copy(update={**several, "rows": 4, "forward_s": 1.4 + 3 * 0.2})
    drafted = base.model_copy(update={**several, "rows": 20, "method": "ssd", "draft_s": 1.0, "forward_s": 3.6})
    costs = fit([*points(lambda *_: 1.0), plain, drafted], 0.0)
    assert costs.sequence == pytest.approx(0.2)
    assert costs.target == pytest.approx({1: 1.1, 3: 1.3, 5: 1.5, 17: 2.7, 20: 3.0})
    assert [costs.forward(4, sequences=4), costs.forward(20, sequences=4)] == pytest.approx([2.0, 3.6])


def round_(forward_s: float, draft_s: float, jit_s: float | None = None) -> RoundReport:
    """Which takes .5 s beyond the forward, or .1 beyond the draft's half."""
    seconds = max(forward_s + 0.5, draft_s + 0.1) + (jit_s or 0.0)
    common = {"began_s": 0.0, "wait_s": 0.0, "rows": 1, "lookups": 1, "hits": 1}
    return RoundReport(forward_s=forward_s, draft_s=draft_s, jit_s=jit_s, round_s=seconds, **common)  # type: ignore[arg-type]


def test_rounds_that_wait_for_the_draft_tell_of_the_exchange() -> None:
    size = Size(lookahead=2, budget=4)
    quick, slow = [round_(4.0, 3.0, None if i % 2 else 1.0) for i in range(9)], [round_(4.0, 6.0)] * 9
    found = point([*quick, *slow], size, "ssd", 0.0)
    assert (found.overhead_s, found.exchange_s) == pytest.approx((0.5, 0.1))
    assert point(quick, size, "ssd", 0.0).exchange_s is None
    assert point(slow, size, "ssd", 0.0).overhead_s is None


def test_fits_have_no_negative_coefficients() -> None:
    costs = fit(points(lambda depth, budget, _: 1.0 + 0.2 * depth - 0.001 * depth * budget), 0.0)
    assert costs.tree.per_row == 0
    assert costs.tree.seconds(4, 8) == pytest.approx(1.8, rel=0.1)
