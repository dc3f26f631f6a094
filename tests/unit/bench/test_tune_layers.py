"""``ssd tune layers``: what is estimated is what happens, the search finds what there is, the best is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ssd import SamplingParams, SpeculationRecord, load_config
from ssd.bench.drafts import skip_estimate
from ssd.bench.drafts.skip_estimate import Costs, Estimate, Estimator, measured_costs, replayed
from ssd.bench.drafts.tune_layers import layers_yaml, measure, patterns, search, shortlist
from ssd.bench.measure.interleave import Runs
from ssd.bench.measure.prompts import DEMO_PROMPTS
from ssd.cli.app import make_app
from ssd.cli.options import Makers
from ssd.models.skipping import SkipSet
from ssd.pipeline.runtime.build_verifier import build_verifier
from ssd.pipeline.runtime.plan import Plan
from ssd.pipeline.runtime.runners import target_runner
from ssd.pipeline.transport.messages import Submit
from ssd.testing.models.tiny import save_tiny
from ssd.testing.twins.llm import ScriptedLLM
from ssd.testing.twins.rounds import decode_alone

LAYERS, TOKENS = 4, 24
PROMPTS = [[9, 30, 77], list(range(20, 44)), [5, 100, 7, 8]]
COSTS = Costs(plain=1.0, attention=0.05, mlp=0.15, row=0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("target"), "llama", num_hidden_layers=LAYERS)


def plan_of(folder: Path, **speculation: Any) -> Plan:
    settings = {
        "target": {"model": str(folder), "compile": False},
        "speculation": {"method": "self", "lookahead": 1, "governor": False, **speculation},
        "engine": {"max_model_len": 128, "prefill_chunk": 16},
    }
    return Plan(config=load_config(settings), vocabulary=128, ends=())


def test_replayed() -> None:
    assert replayed([True] * 10, [1.0] * 10, 4, 0.5) == (2, 8, 8)
    assert replayed([False] * 4, [1.0] * 4, 2, 0.5) == (4, 7, 0)  # one token a round; the last has room for one
    assert replayed([True] * 6, [0.4] * 6, 4, 0.5) == (3, 3, 3)  # an unsure token ends its chain, and counts
    assert replayed([True, False, True, True, True, False], [1.0] * 6, 3, 0.0) == (2, 6, 4)


@pytest.mark.parametrize("skips", [([1], [2]), ([2, 3], [2, 3]), ([], [1]), ([0, 1, 2, 3], [0, 1, 2, 3])])
def test_estimates_are_what_happens(skips: tuple[list[int], list[int]], folder: Path) -> None:
    """A chain of one token sees verified keys alone, as the estimate does: rounds and acceptance are the same."""
    estimator = Estimator(plan_of(folder), PROMPTS, tokens=TOKENS)
    agrees, _ = estimator.agreement(SkipSet.of(*skips, LAYERS))
    drafts = {"skip_attention": skips[0], "skip_mlp": skips[1], "confidence": 0.0}
    worker = build_verifier(plan_of(folder, self=drafts))[0]
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    for prompt, row in zip(PROMPTS, agrees, strict=True):
        worker.submit(Submit(request=0, prompt=prompt, params=params))
        record = SpeculationRecord()
        for verdict in decode_alone(worker):
            record = verdict.commits[0].record if verdict.commits else record
        assert replayed(row, [1.0] * TOKENS, 1, 0.0) == (record.rounds, record.drafted, record.accepted)


def test_a_model_that_skips_nothing_agrees_with_itself(folder: Path) -> None:
    estimator = Estimator(plan_of(folder), PROMPTS, tokens=TOKENS)
    found = estimator.of(SkipSet.of((), (), LAYERS))
    assert (found.acceptance, found.cost) == (1.0, 1.0)
    assert estimator.of(SkipSet.of([0, 1], [0], LAYERS)).acceptance < 1
    assert len(estimator.seen) == 2 and estimator.seen[0].speedup >= estimator.seen[1].speedup


def test_costs(folder: Path) -> None:
    measured = measured_costs(target_runner(plan_of(folder)), timed=3)
    assert measured.plain > 0 and min(measured.attention, measured.mlp, measured.row) >= 0
    assert COSTS.step(SkipSet.of([0, 1], [3], LAYERS)) == pytest.approx(0.75)
    assert COSTS.verification(5) == pytest.approx(1.1)


def by_distance(hidden: SkipSet) -> Callable[[SkipSet], Estimate]:
    def of(skips: SkipSet) -> Estimate:
        apart = len(skips.attention ^ hidden.attention) + len(skips.mlp ^ hidden.mlp)
        return Estimate(
            skips=skips, lookahead=2, confidence=0.5, cost=0.5, acceptance=0.5, speedup=2.0 - apart / (4 * LAYERS)
        )

    return of


def test_the_search_climbs_to_the_best_set() -> None:
    hidden = SkipSet.of([0, 2, 5, 6], [1, 6], 8)
    found = search(by_distance(hidden), 8, deadline_s=time.monotonic() + 30)
    assert found.skips == hidden and hidden not in set(patterns(8))
    no_time = search(by_distance(hidden), 8, deadline_s=time.monotonic() - 1)
    assert no_time.skips in set(patterns(8))


def test_patterns_are_sets_of_any_model() -> None:
    for layers in (1, 2, 6, 32):
        found = list(patterns(layers))
        assert all(skips.layers == layers for skips in found)
    assert any(skips.exit == 16 for skips in patterns(32))


def test_the_shortlist_has_different_sets() -> None:
    of = by_distance(SkipSet.of(range(8), range(8), 8))
    seen = [of(SkipSet.of(range(8), range(n), 8)) for n in (8, 7, 6, 2)]
    assert [len(one.estimate.skips.mlp) for one in shortlist(seen, 2)] == [8, 2]
    assert [len(one.estimate.skips.mlp) for one in shortlist(seen, 3)] == [8, 2, 7]  # no others are left


def test_measured_in_turns_and_written(folder: Path) -> None:
    config = load_config("embedded")
    candidate = shortlist([by_distance(SkipSet.of([2], [3], 6))(SkipSet.of([2], [3, 4], 6))], 1)[0]
    ran = measure(ScriptedLLM, config, candidate, DEMO_PROMPTS[:2], Runs(max_tokens=8))  # type: ignore[arg-type]
    assert ran.speedup == pytest.approx(2.0 / 1.8) and ran.identical
    written = load_config(layers_from(layers_yaml(config, ran, "two\nlines"), folder))
    assert written.draft is None and written.speculation.method == "self"
    assert written.speculation.self is not None
    assert (written.speculation.self.skip_attention, written.speculation.self.skip_mlp) == ([2], [3, 4])


def layers_from(text: str, folder: Path) -> Path:
    assert text.startswith("# two\n# lines\n")
    path = folder.parent / "written.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skip_estimate, "measured_costs", lambda runner: replace(COSTS, plain=1.0))
    wanted = ["--set", f"target.model={folder}", "--set", "target.compile=false", "--set", "target.cores=null"]
    out = tmp_path / "layers.yaml"
    sizes = ["--candidates", "2", "--tokens", "8", "--max-tokens", "8", "--minutes", "0.1", "--out", str(out)]
    app = make_app(Makers(llm=ScriptedLLM))  # type: ignore[arg-type]
    result = CliRunner().invoke(app, ["tune", "layers", *wanted, *sizes])
    assert result.exit_code == 0, result.output
    assert "1.11×" in result.output and str(out.name) in result.output.replace("\n", "")
    assert load_config(out).speculation.method == "self"
    broken = CliRunner().invoke(make_app(), ["tune", "layers", *wanted, "--out", str(tmp_path / "no" / "layers.yaml")])
    assert broken.exit_code == 2 and "does not exist" in broken.output
