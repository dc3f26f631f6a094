"""``scripts/gpu_check.py`` on tiny models and the CPU: every stage runs, resumes, and reports what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import gpu_check
from scripts.gpu import checks
from scripts.gpu.bench import Bench

MEASURED = {
    "correctness": ("ok", 7),
    "kernels": ("tree_ms", 7),
    "forwards-1b": ("rows_8_ms", 5),
    "engines-1b": ("ssd T=1", 2),
    "batches-1b": ("ssd T=1", 1),
}


@pytest.mark.parametrize(
    "stage", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("batches") else name for name in MEASURED]
)
def test_a_stage_runs_and_resumes(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--stage", stage, "--tiny", "--out", str(tmp_path)]
    assert gpu_check.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"stage {stage}" in printed and f"torch {torch.__version__}" in printed
    record = json.loads((tmp_path / f"stage-{stage}.json").read_text())
    key, count = MEASURED[stage]
    assert len(record["parts"]) == count
    assert any(key in part for part in record["parts"].values())
    assert all("error" not in part for part in record["parts"].values())
    if stage != "correctness":
        assert list(tmp_path.glob(f"stage-{stage}-*.png"))
    # A second run finds everything there.
    assert gpu_check.main([*arguments[:-1], str(tmp_path / "again"), "--have", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "again" / f"stage-{stage}.json").read_text())
    assert again["parts"] == record["parts"]
    assert f"] {stage}:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "runs"),
    [
        (lambda: {"ok": True}, 1),
        (lambda: {"ms": 3.0}, 1),
        (lambda: {"ok": False, "why": "numbers"}, 2),
        (lambda: 1 / 0, 2),
    ],
)
def test_parts_run_again_unless_they_succeeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Callable[[], Any], runs: int
) -> None:
    results = [first, lambda: {"ok": True}]
    monkeypatch.setattr(
        gpu_check, "STAGES", {"correctness": lambda bench: bench.part("part", lambda: results.pop(0)())}
    )
    arguments = ["--stage", "1", "--tiny", "--out", str(tmp_path)]
    monkeypatch.setattr(gpu_check.report, "print_table", lambda *_: None)
    assert gpu_check.main(arguments) == runs - 1
    assert gpu_check.main(arguments) == 0
    assert 2 - len(results) == runs


def test_what_is_wrong_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(bench: Bench) -> None:
        bench.part("wrong", lambda: {"ok": False, "why": "numbers"})
        bench.part("broken", lambda: 1 / 0)
        bench.budget_s = -1.0
        bench.part("late", lambda: {"ok": True})

    monkeypatch.setattr(gpu_check, "STAGES", {"correctness": stage})
    assert gpu_check.main(["--stage", "1", "--tiny", "--out", str(tmp_path)]) == 1
    parts = json.loads((tmp_path / "stage-correctness.json").read_text())["parts"]
    assert "ZeroDivisionError" in parts["broken"]["error"] and "late" not in parts


def test_the_row_check_sees_attention_that_depends_on_mates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Bench(
        device=torch.device("cpu"), out=tmp_path, tiny=True, budget_s=1e9, pair=gpu_check._tiny_pair(tmp_path)
    )
    assert checks.rows(bench, "float32")["ok"]
    forward = checks.ForwardRunner.forward

    def leaking(self, plan, tokens, lengths, **more):
        return forward(self, plan, tokens, lengths, **more) + tokens.float().mean() * 1e-6

    monkeypatch.setattr(checks.ForwardRunner, "forward", leaking)
    found = checks.rows(bench, "float32")
    assert not found["ok"] and not found["rows"]["whatever the mates"]


def test_without_a_gpu_it_reports_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu_check.main(["--stage", "1", "--out", str(tmp_path)])
    assert "needs a CUDA device" in capsys.readouterr().err
