"""Bytes on the command line that are not UTF-8: one line, exit code 2, and no model is loaded for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.cli.test_cli_errors import complaint, models  # noqa: F401

BROKEN = os.fsdecode(b"a\xff b")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([BROKEN], "prompt must be valid Unicode"),
        (["x", "--stop", BROKEN], "stop must be valid Unicode"),
        (["x", "--bad-words", BROKEN], "bad_words"),
        (["x", "--regex", BROKEN], "structured_outputs"),
        (["x", "--config", BROKEN], "not found"),
        (["x", "--set", f"target.model={BROKEN}"], "target.model"),
    ],
    ids=["prompt", "stop", "bad-words", "regex", "config", "set"],
)
def test_generate_names_it(arguments: list[str], said: str, models: list[str]) -> None:  # noqa: F811
    line = complaint("generate", *models, *arguments)
    assert said in line
    assert line.encode()


@pytest.mark.parametrize("content", [b"\xff\xfe", b'{"prompt": "\\ud800"}'], ids=["bytes", "surrogate"])
def test_files_of_prompts(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(content)
    assert "prompts.jsonl" in complaint("compare", "--prompts", str(tmp_path / "prompts.jsonl"))
