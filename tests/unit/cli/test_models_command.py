"""``ssd models``: what is said of models, of pairs, and of model types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ssd.cli.app import make_app
from ssd.models.runner import ForwardRunner
from ssd.testing.models import census
from ssd.testing.models.census import Finding

RUN = CliRunner()
FolderOf = Callable[..., Path]


def test_models_are_described_and_a_draft_is_compared(folder_of: FolderOf, tmp_path: Path) -> None:
    target, draft, file = folder_of("llama"), folder_of("qwen2"), tmp_path / "models.json"
    done = RUN.invoke(make_app(), ["models", str(target), str(draft), "--json", str(file)])
    assert done.exit_code == 0, done.output
    [first, second] = json.loads(file.read_text())
    assert first["type"].startswith("llama, ")
    assert first["decodes"] == second["decodes"] == "as transformers does"
    assert "pair" not in first
    assert second["pair"] == "one vocabulary"


def test_a_window_is_named(folder_of: FolderOf) -> None:
    done = RUN.invoke(make_app(), ["models", "check", str(folder_of("mistral"))])
    assert "with a window of " in done.output


def test_a_missing_model_is_one_line_and_the_others_are_tried(folder_of: FolderOf, tmp_path: Path) -> None:
    done = RUN.invoke(make_app(), ["models", str(tmp_path / "nothing"), str(folder_of("llama"))])
    assert done.exit_code == 1
    assert done.output.count("refused") == 1
    assert "decodes    as transformers does" in done.output


def test_a_model_that_decodes_wrong_is_refused(folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ForwardRunner.logits
    monkeypatch.setattr(ForwardRunner, "logits", lambda *args, **kwargs: right(*args, **kwargs).flip(-1))
    done = RUN.invoke(make_app(), ["models", str(folder_of("llama"))])
    assert done.exit_code == 1
    assert "refused    llama: decoding with this engine's cache gives other logits" in done.output


@pytest.mark.parametrize(("outcome", "code"), [("equal", 0), ("refused", 0), ("different", 1), ("failed", 1)])
def test_the_census_fails_where_a_type_is_wrong(outcome: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census, "examine", lambda name, _: Finding(model_type=name, outcome=outcome, why="so"))
    done = RUN.invoke(make_app(), ["models", "census", "llama", "gpt2"])
    assert done.exit_code == code
    assert f"2 {outcome}" in done.output


def test_findings_are_kept_and_fill_a_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def examine(name: str, _: object) -> Finding:
        asked.append(name)
        return Finding(model_type=name, outcome="refused", why=f"{name}: odd")

    monkeypatch.setattr(census, "examine", examine)
    findings, page = tmp_path / "findings.jsonl", tmp_path / "page.md"
    page.write_text(f"before\n{census.MARKS[0]}\nold\n{census.MARKS[1]}\nafter\n")
    for types in (["llama"], ["llama", "gpt2"]):
        command = ["models", "census", *types, "--findings", str(findings), "--page", str(page)]
        assert RUN.invoke(make_app(), command).exit_code == 0
    assert asked == ["llama", "gpt2"]
    assert "| `gpt2` | refused | odd |" in page.read_text()
    assert "old" not in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")


def test_an_unknown_model_type_is_one_line() -> None:
    done = RUN.invoke(make_app(), ["models", "census", "llama5"])
    assert done.exit_code == 2
    assert done.output.strip().endswith("error: the installed transformers has no causal model type 'llama5'")
