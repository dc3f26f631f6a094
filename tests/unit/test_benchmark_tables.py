"""benchmarks/tables.py: figures files to Markdown; benchmarks/run_all.py: its commands are commands."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from ssd.bench.compare import compare
from ssd.bench.prompts import DEMO_PROMPTS
from ssd.cli import app
from ssd.testing.scripted_llm import ScriptedLLM

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_tables_of_every_kind_of_file(tmp_path: Path) -> None:
    data = compare(ScriptedLLM(), DEMO_PROMPTS, max_tokens=20).to_json()  # type: ignore[arg-type]
    swept = {"sweep": "speculation.lookahead", "value": "2", **data}
    check = {"setting": {"method": "ssd", "lookahead": 3, "budget": 8, "temperature": 0.0}, "measured": 100.0}
    check |= {"simulated": 90.0, "error": -0.1}
    files = {
        "a/compared.json": data,
        "b/benched.json": {"settings": [data, swept], "skipped": {"vllm": "not there"}},
        "b/validated.json": {"checks": [check], "mean_error": 0.1},
        "b/other.json": {"methods": ["none"]},
        "b/list.json": [1, 2],
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    text = load("tables").tables(tmp_path)
    assert text.index("### b") < text.index("### a")
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


@pytest.mark.parametrize("stage", load("run_all").STAGES, ids=lambda stage: stage.name)
def test_stages_are_commands(stage, tmp_path: Path) -> None:
    """Every option exists: with a configuration that does not, that is all there is to complain of."""
    places = dict.fromkeys(("out", "folder", "wide", "three", "five"), tmp_path / "x")
    command = shlex.split(stage.command.format(**places, vllm="", wide_options=""))
    if command[0] == "plan" and "--measure" not in command:
        command += ["--profile", "nowhere.json"]
    result = CliRunner().invoke(app, [*command, "--config", "nowhere"])
    assert result.exit_code == 2
    assert "nowhere" in result.stderr
