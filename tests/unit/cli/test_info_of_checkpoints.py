"""``ssd info`` names the format of quantised weights, and counts the model's parameters, not the packed words."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ssd.cli.app import make_app
from ssd.testing.models import packing
from ssd.testing.models.tiny import save_tiny, tiny_model


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    packing.write_awq(save_tiny(tmp_path / "plain", "llama"), tmp_path / "awq")
    return tmp_path / "awq"


def _line(*settings: str) -> str:
    arguments = [part for setting in settings for part in ("--set", setting)]
    result = CliRunner().invoke(make_app(), ["info", *arguments])
    assert result.exit_code == 0, result.output
    return next(line for line in result.stdout.splitlines() if line.startswith("target"))


def test_format_and_size(packed: Path) -> None:
    size = sum(weight.numel() for weight in tiny_model("llama").parameters()) / 1e6
    assert f"{size:.1f} M parameters, awq (4 bits, groups of 32), weights dequantised" in _line(
        f"target.model={packed}"
    )


def test_what_is_refused_is_shown(packed: Path) -> None:
    assert "cannot stay packed on cpu" in _line(f"target.model={packed}", "target.weights=packed")
    config = packed / "config.json"
    config.write_text(config.read_text().replace('"awq"', '"teapot"'))
    assert "quantisation 'teapot' is not supported" in _line(f"target.model={packed}")


def test_the_adapter_is_named(packed: Path) -> None:
    assert "adapter /adapters/legal" in _line(f"target.model={packed}", "target.adapter=/adapters/legal")
