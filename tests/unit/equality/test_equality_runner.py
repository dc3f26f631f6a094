"""The runner of the equality counts: what it covers, and that it goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import equality
from ssd.testing.models.tiny import ARCHITECTURES

SMALL = ["tiny", "--prompts", "8", "--cases", "2", "--max-tokens", "24"]


def test_cases_cover_what_is_claimed() -> None:
    cases = list(equality.tiny_cases(Path("models"), 1000, 27))
    assert sum(case.prompts for case in cases) == 1000 and min(case.prompts for case in cases) > 0
    assert len({case.name for case in cases}) == 27
    assert {case.name.split()[0] for case in cases} == set(ARCHITECTURES)
    assert {case.config["engine"]["max_batch"] for case in cases} == set(range(1, 9))
    assert {case.config["speculation"]["siblings"] for case in cases} == {0, 1, 2}
    for architecture in ARCHITECTURES:
        assert {c.name.split()[1] for c in cases if c.name.startswith(f"{architecture} ")} == {"float32", "bfloat16"}
    trials = equality.asked([(5,)] * 28, 16, 0)
    assert len({replace(trial.params, seed=0) for trial in trials}) == 28
    embedded = list(equality.embedded_cases(208))
    for dtype in ("float32", "bfloat16"):
        assert sum(case.prompts for case in embedded if dtype in case.name) == 208
    prompts = equality.source_prompts(156, 1)
    assert len(set(prompts)) > 150


def test_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "equality.jsonl"
    assert equality.main([*SMALL, "--out", str(out)]) == 0
    first, second = out.read_text().splitlines()
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["prompts"] == 8
    assert sum(group["outputs"] for group in report["groups"]) == 16
    assert all(group["equal"] == group["outputs"] for group in report["groups"])
    ran: list[str] = []
    run_case = equality.run_case

    def noting(case: equality.Case, trials: list) -> dict:
        ran.append(case.name)
        return {**run_case(case, trials), "passed": False, "faults": ["as if"]}

    monkeypatch.setattr(equality, "run_case", noting)
    out.write_text(first + "\n")
    assert equality.main([*SMALL, "--out", str(out)]) == 1
    assert ran == [json.loads(second)["case"]]
    assert len(out.read_text().splitlines()) == 2
