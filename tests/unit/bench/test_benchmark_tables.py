"""benchmarks/tables.py makes Markdown from result files; the stages of benchmarks/run_all.py are valid commands."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from ssd.bench.measure.compare import compare
from ssd.bench.measure.interleave import Runs
from ssd.bench.measure.prompts import DEMO_PROMPTS
from ssd.cli.app import make_app
from ssd.testing.twins.llm import ScriptedLLM

ROOT = Path(__file__).resolve().parents[3]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_tables_of_every_kind_of_file(tmp_path: Path) -> None:
    data = compare(ScriptedLLM(), DEMO_PROMPTS, Runs(max_tokens=20)).to_json()  # type: ignore[arg-type]
    swept = {"sweep": "speculation.lookahead", "value": "2", **data}
    check = {"setting": {"method": "ssd", "lookahead": 3, "budget": 8, "temperature": 0.0}, "measured": 100.0}
    check |= {"simulated": 90.0, "error": -0.1}
    files = {
        "compared.json": data,
        "benched.json": {"settings": [data, swept], "skipped": {"vllm": "not there"}},
        "validated.json": {"checks": [check], "mean_error": 0.1},
        "other.json": {"methods": ["none"]},
        "list.json": [1, 2],
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    text = load("tables").tables(tmp_path)
    assert text.index("`benched`") < text.index("`compared`") < text.index("`validated`")
    for part in (
        "| ssd | ",
        "Ratios: ssd / sd 1.60, sd / none 1.56",
        "`benched, speculation.lookahead = 2`",
        "vllm (not there)",
        "| ssd | 3 | 8 | 0 | 100.0 |",
    ):
        assert part in text
    assert "other" not in text and "list" not in text


def test_the_page_has_its_place_for_tables() -> None:
    module = load("tables")
    page = module.PAGE.read_text(encoding="utf-8")
    assert page.count(module.BEGIN) == page.count(module.END) == 1


def test_the_page_of_exactness_has_a_place_for_every_kind(tmp_path: Path) -> None:
    module = load("tables")
    page = module.EXACTNESS.read_text(encoding="utf-8")
    assert module.exactness(page, tmp_path) == page  # nothing measured
    row = {
        "rule": "rejection, C = 0.5",
        "temperature": 0.7,
        "acceptance_rate": 0.5,
        "hit_rate": 0.75,
        "acceptance_length": 2.5,
        "bytes_per_round": 12345.0,
        "tokens_per_second": 300.0,
        "speedup": 1.25,
        "round_ms": 6.0,
        "draft_ms": 5.0,
    }
    group = {"method": "ssd", "temperature": 0.7, "outputs": 52, "equal": 51, "near_ties": 0, "structural": 1}
    case = {"case": "embedded float32", "weights": {"target": "a" * 64, "draft": "b" * 64}}
    test = {"split": "all", "samples": 300, "freedom": 9, "p": 0.125}
    files = {
        "rules.json": {"rows": [row, row | {"rule": "coupled", "speedup": 1.5}]},
        "equality-embedded.json": {"prompts": 26, "of": 4, "groups": [group | {"tokens": 13312}], "cases": [case]},
        "chi_square.json": [{"case": "block", "fallback": "jit", "samples": 300, "seconds": 1, "tests": [test]}],
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    text = module.exactness(page, tmp_path)
    for part in (
        "| 0.7 | rejection, C = 0.5 | 0.50 | 0.75 | 2.50 | 12,345 | 300 | 1.25 | 6.00 | 5.00 |",
        "T = 0.7: coupled has the largest speedup, 1.50.",
        "`benchmarks/results/rules.json`",
        "| ssd | 0.7 | 52 | 51 | 0 | 1 | 13312 |",
        "bbbbbbbbbbbb.",
        "| block | jit | 0.125 |",
    ):
        assert part in text
    assert module.exactness(text, tmp_path) == text


@pytest.mark.parametrize("stage", load("run_all").STAGES, ids=lambda stage: stage.name)
def test_stages_are_commands(stage, tmp_path: Path) -> None:
    """Every option exists: with a missing configuration, that is the only complaint."""
    places = dict.fromkeys(("json", "work", "results", "wide", "three", "five"), tmp_path / "x")
    command = shlex.split(stage.command.format(**places, vllm="", wide_options=""))
    if command[0] == "plan" and "--measure" not in command:
        command += ["--profile", "nowhere.json"]
    result = CliRunner().invoke(make_app(), [*command, "--config", "nowhere"])
    assert result.exit_code == 2
    assert "nowhere" in result.stderr


def test_stages_write_their_results_flat(tmp_path: Path) -> None:
    """A stage writes NAME.json into the results folder, and nothing else there; one whose file exists is skipped."""
    run_all, results, work = load("run_all"), tmp_path / "results", tmp_path / "work"
    results.mkdir()
    (results / "batch-t0.json").write_text("{}")
    app = typer.Typer()
    app.command()(run_all.main)
    options = ["--dry-run", "--out", str(results), "--work", str(work)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    assert f"batch-t0: {results / 'batch-t0.json'} exists" in done.output
    assert f"--json {results / 'embedded-t0.json'} --html {work / 'embedded-t0.html'}" in done.output
    assert f"--profile {results / 'profile.json'}" in done.output
    assert [file.name for file in results.iterdir()] == ["batch-t0.json"]
    again = CliRunner().invoke(app, [*options, "--again", "--only", "batch-t0"])
    assert f"--json {results / 'batch-t0.json'}" in again.output and "embedded" not in again.output.split("--config")[0]
