"""The model card of the shipped pair is the one its report gives; pictures of training can be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.pair.card import alpha, card
from scripts.pair.pictures import draw_polish, draw_training

PAIR = Path(__file__).resolve().parents[3] / "ssd" / "data" / "embedded"


def test_the_shipped_card_belongs_to_the_shipped_report() -> None:
    report = json.loads((PAIR / "evaluation.json").read_text(encoding="utf-8"))
    pictures = ("../../../docs/embedded_loss.png", "../../../docs/embedded_polish.png")
    assert card(report, *pictures) == (PAIR / "README.md").read_text(encoding="utf-8")
    assert "**Unfinished:**" in card(report | {"finished": False}, *pictures)


def test_acceptance_rates_with_their_errors() -> None:
    assert alpha(0.5, 0.012) == "0.500 ± 0.012"
    assert alpha(None, None) == "–"


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = [{"step": step, "loss": 5 - step, "heldout_code": 4 - step, "heldout_prose": 4} for step in range(3)]
    draft = [{"step": step, "loss": 1.0, "agree_code": 0.5, "agree_prose": 0.4} for step in range(3)]
    draw_training({"target": target, "draft": draft}, tmp_path / "new" / "loss.png")
    alphas = {f"alpha_{kind}_{heat}": 0.5 for kind in ("code", "prose") for heat in "01"}
    draw_polish([{"step": step, "loss": 1.0, **alphas} for step in range(3)], tmp_path / "polish.png")
    for file in (tmp_path / "new" / "loss.png", tmp_path / "polish.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
