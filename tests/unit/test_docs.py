"""The documentation names only files, modules and links that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "results" / "README.md"]
SOURCE = re.compile(r"`((?:ssd|tests|scripts|launch|benchmarks|configs)/[\w./-]+?\.(?:py|yaml|html|cpp|sh|json))`")
FOLDER = re.compile(r"`((?:ssd|tests|scripts|launch|benchmarks|configs)(?:/[\w-]+)+)/?`")
MODULE = re.compile(r"`(ssd(?:\.[a-z_]+)+)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_names_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {*SOURCE.findall(text), *FOLDER.findall(text)}
    missing = sorted(path for path in named if not (ROOT / path).exists())
    for module in MODULE.findall(text):
        place = ROOT.joinpath(*module.split("."))
        if not (place.is_dir() or place.with_suffix(".py").is_file()):
            missing.append(module)
    for link in LINK.findall(text):
        if "://" not in link and not link.startswith("mailto:") and not (page.parent / link).exists():
            missing.append(link)
    assert not missing


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def test_links_are_seen() -> None:
    assert LINK.findall("[a](docs/a.md#b) and ![c](d.png)") == ["docs/a.md", "d.png"]
    assert SOURCE.findall("`ssd/errors.py`") == ["ssd/errors.py"] and MODULE.findall("`ssd.errors`") == ["ssd.errors"]
