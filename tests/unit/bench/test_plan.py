"""Planning and tuning from a profile: what is searched, what is written, the commands."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from ssd.bench.measure.interleave import Runs
from ssd.bench.measure.prompts import Prompt
from ssd.bench.report.pictures import spans
from ssd.bench.report.plan_report import plan_pictures, print_advice, print_checks
from ssd.bench.simulate.calibrate import Size
from ssd.bench.simulate.plan import Space, Validation, advise, ranked, validate
from ssd.bench.simulate.profile import Costs, Independent, Line, Profile
from ssd.bench.simulate.simulator import Setting, Simulator, simulate
from ssd.bench.simulate.tune import measure_candidates, shortlist, tuned_yaml
from ssd.cli.app import make_app
from ssd.cli.options import Makers
from ssd.config.load import load_config
from ssd.testing.twins.llm import ScriptedLLM

PROMPTS = [Prompt(name="f", text="def f", category="code"), Prompt(name="p", text="The", category="prose")]
SPACE = Space(lookaheads=(1, 2, 4, 8), budgets=(4, 16, 48), rows=())
PNG = b"\x89PNG"


def costly(per_row: float = 0.002) -> Profile:
    costs = Costs(
        target={1: 1.0, 9: 1.2},
        tree=Line(base=0.1, per_step=0.15, per_row=per_row),
        jit=Line(per_step=0.15),
        overhead={"none": 0.01, "sd": 0.05, "ssd": 0.02},
    )
    return Profile(name="made", costs={"0": costs}, content={"0": Independent(acceptance=0.8, miss=0.8, power=0.8)})


def test_the_best_setting_is_where_draft_and_verifier_balance() -> None:
    found = ranked(Simulator(costly()), Setting(), SPACE)
    assert [one.tokens_per_second for one in found] == sorted((o.tokens_per_second for o in found), reverse=True)
    assert len(found) == len(SPACE.lookaheads) * len(SPACE.budgets)
    # A tree of 8 steps takes 1.3 verifications: deeper is not better.
    assert found[0].setting.lookahead == 4
    free = ranked(Simulator(costly(per_row=0.0)), Setting(), replace(SPACE, lookaheads=(4,)))
    assert free[0].setting.budget == 48


def test_advice() -> None:
    advice = advise(costly(), 0.0, SPACE)
    assert json.loads(json.dumps(advice)) == advice
    assert advice["ssd"]["tokens_per_second"] > advice["sd"]["tokens_per_second"]
    assert advice["sd"]["tokens_per_second"] > advice["none_fast"]["tokens_per_second"]
    for count, shares in advice["devices"].items():
        rates = [one["tokens_per_second"] for one in shares]
        assert rates == sorted(rates, reverse=True)
        for one in shares:
            at = one["setting"]
            used = at["target_devices"] + (at["draft_devices"] if at["method"] == "ssd" else 0)
            assert used <= int(count)
    console = Console(file=io.StringIO(), width=200)
    print_advice(advice, console)
    assert "verifier busy" in console.file.getvalue()  # type: ignore[attr-defined]
    drawn = plan_pictures({"answers": [advice]})
    assert set(drawn) == {f"plan-{what}-T0" for what in ("lookahead", "budget", "batch", "devices")}
    assert all(png.startswith(PNG) for png in drawn.values())


def test_the_shortlist_takes_the_smaller_budget_where_it_does_as_well() -> None:
    chosen = shortlist(costly(), 0.0, 2, SPACE)
    assert len({(one.size.lookahead, one.rows) for one in chosen}) == 2
    assert chosen[0].simulated >= chosen[1].simulated
    flat = Profile(
        name="flat",
        costs=costly(0.0).costs,
        content={"0": Independent(acceptance=0.8, miss=0.0)},
    )
    assert all(one.size.budget == 4 for one in shortlist(flat, 0.0, 3, SPACE))


def test_tuning_measures_and_writes(tmp_path: Path) -> None:
    rates = {2: 1.0, 4: 0.5}
    seen: list[str] = []

    class Timed(ScriptedLLM):
        def answer(self, prompt: str, params: Any) -> Any:
            slow = rates[self.config.speculation.lookahead] if params.method == "ssd" else 1.0
            return replace(super().answer(prompt, params), decode_s=slow)

    config = load_config("embedded")
    candidates = [one for one in shortlist(costly(), 0.0, 4, SPACE) if one.size.lookahead in rates]
    plain, found = measure_candidates(
        Timed,  # type: ignore[arg-type]
        config,
        candidates,
        PROMPTS,
        Runs(max_tokens=10, repeat=2),
        progress=lambda d, t, label: seen.append(label),
    )
    assert plain == pytest.approx(10.0)
    assert [one.size.lookahead for one in found] == [4, 2]
    assert found[0].measured == pytest.approx(20.0)
    text = tuned_yaml(config, found[0], "one\ntwo")
    assert text.startswith("# one\n# two\n")
    written = load_config(yaml.safe_load(text))
    assert written.speculation.lookahead == 4
    assert written.speculation.governor == config.speculation.governor
    assert written.target == config.target


def test_validation_compares_rates() -> None:
    class Exact(ScriptedLLM):
        def answer(self, prompt: str, params: Any) -> Any:
            at = self.config.speculation
            setting = Setting(method=params.method, lookahead=at.lookahead, budget=at.forecast.budget)
            rate = simulate(costly(), setting, tokens=40).tokens_per_second
            faster = 2.0 if params.method == "none_fast" else 2.5  # the machine is twice as fast as the profile's
            return replace(super().answer(prompt, params), decode_s=params.max_tokens / rate / faster)

    sizes = (Size(lookahead=2, budget=4), Size(lookahead=4, budget=16))
    options = Validation(sizes=sizes, temperatures=(0.0,), max_tokens=20)
    checks = validate(Exact, costly(), load_config("embedded"), PROMPTS, options)  # type: ignore[arg-type]
    assert [(c.setting.method, c.setting.lookahead) for c in checks] == [("sd", 2), ("ssd", 2), ("sd", 4), ("ssd", 4)]
    assert [c.machine for c in checks] == pytest.approx([2.0] * 4)
    assert [c.error for c in checks] == pytest.approx([1 / 1.25 - 1] * 4)
    console = Console(file=io.StringIO(), width=120)
    print_checks(checks, console)
    assert "mean error 20.0% over 4 settings" in console.file.getvalue()  # type: ignore[attr-defined]
    assert plan_pictures({"checks": [c.to_json() for c in checks]})["plan-validation"].startswith(PNG)


def test_a_simulated_timeline_is_whole() -> None:
    costs = Costs(target={1: 1.0}, tree=Line(base=1.25), jit=Line(per_step=0.1), overhead={"ssd": 0.0})
    content = Independent(acceptance=0.7, miss=0.5, power=1e-9)
    found = Profile(name="t", costs={"0": costs}, content={"0": content})
    rounds = simulate(found, Setting(lookahead=4, budget=1), tokens=200).rounds
    for lane in ("verifier", "draft"):
        ends = 0.0
        for _, began_s, seconds, _ in sorted(span for span in spans(rounds) if span[0] == lane):
            assert began_s == pytest.approx(ends)  # nothing overlaps, nothing is left out: no overhead here
            ends = began_s + seconds
        assert ends == pytest.approx(sum(one.round_s for one in rounds))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    file = tmp_path / "p.json"
    file.write_text(costly().model_dump_json())
    return file


def test_plan_command(made: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "a.json", tmp_path / "pictures"
    command = ["plan", "--profile", str(made), "--temperatures", "0", "--json", str(out), "--pictures", str(folder)]
    result = CliRunner().invoke(make_app(), command)
    assert result.exit_code == 0, result.output
    answers = json.loads(out.read_text())
    assert answers["profile"] == "made"
    assert len(answers["answers"]) == 1
    assert len(list(folder.glob("*.png"))) == 4


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["plan", "--profile", "nowhere.json"], "ssd plan --measure"),
        (["plan", "--temperatures", "x"], "--temperatures"),
        (["plan", "--json", "no/such/folder/a.json"], "create it first"),
        (["tune", "--out", "no/such/folder/a.yaml"], "create it first"),
        (["tune", "speculation", "--config", "nowhere"], "nowhere"),
    ],
)
def test_wrong_commands(command: list[str], message: str) -> None:
    result = CliRunner().invoke(make_app(), command)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_tune_command(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.yaml"
    command = ["tune", "--profile", str(made), "--out", str(out), "--candidates", "2", "--max-tokens", "12"]
    result = CliRunner().invoke(make_app(Makers(llm=ScriptedLLM)), command)  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    assert "measured tok/s" in result.stdout
    assert load_config(str(out)).speculation.method == "ssd"
    assert out.read_text().startswith("# By ssd tune from embedded")
