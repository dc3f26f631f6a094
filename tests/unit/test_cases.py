"""The table of cases names tests that exist, at least one for each case."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "cases.md").read_text(encoding="utf-8")
TEST = re.compile(r"`(tests/[\w./]+\.py)::(\w+)`")


def functions(path: Path) -> set[str]:
    """Returns the names of the functions at a module's top level."""
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("file", sorted({file for file, _ in TEST.findall(PAGE)}))
def test_named_tests_exist(file: str) -> None:
    assert {name for other, name in TEST.findall(PAGE) if other == file} <= functions(ROOT / file)


def test_every_case_names_its_tests() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| input ")]
    assert len(rows) > 40
    for row in rows:
        *_, tests, end = re.split(r"(?<!\\)\|", row)
        assert end == "" and TEST.findall(tests) and not TEST.sub("", tests).strip(), row
