"""Writes the tables of all results into benchmarks/results/README.md and docs/exactness.md.

    python benchmarks/tables.py [--results benchmarks/results]

The results folder holds one JSON file for each benchmark, named after it: NAME.json is the newest run of NAME. Tables
replace the text between markers in the pages. A part of docs/exactness.md whose file does not exist stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = RESULTS / "README.md"
EXACTNESS = HERE.parent / "docs" / "exactness.md"
BEGIN, END = "<!-- tables: begin (benchmarks/tables.py) -->", "<!-- tables: end -->"
COLUMNS = (
    ("tokens_per_second", "tok/s", 1),
    ("speedup", "over none_fast", 2),
    ("acceptance_rate", "α", 2),
    ("acceptance_length", "tokens/round", 2),
    ("hit_rate", "hits", 2),
    ("round_ms", "round ms", 2),
    ("hit_round_ms", "hit round ms", 2),
    ("forward_ms", "forward ms", 2),
    ("draft_ms", "draft ms", 2),
)
RATIOS = (
    ("ssd", "sd"),
    ("sd", "none"),
    ("none_fast", "transformers"),
    ("none_fast", "vllm"),
    ("ssd", "transformers-assisted"),
    ("ssd", "vllm-draft"),
)


def tables(folder: Path) -> str:
    """Returns Markdown tables of every file of figures in the folder, by name."""
    return "\n".join(text for file in sorted(folder.glob("*.json")) for text in _file(file))


def _file(file: Path) -> Iterator[str]:
    """Yields the tables of a file by ``ssd bench``, ``compare`` or ``plan --validate``; other files have none."""
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        return
    if "checks" in data:
        yield _checks(file.stem, data)
    found = data.get("settings", [data] if isinstance(data.get("methods"), dict) and "lookahead" in data else [])
    for one in found:
        swept = f", {one['sweep']} = {one['value']}" if one.get("sweep") else ""
        yield _methods(f"{file.stem}{swept}", one)
    for name, reason in data.get("skipped", {}).items():
        yield f"Not measured in `{file.stem}`: {name} ({reason})\n"


def _methods(title: str, one: dict[str, Any]) -> str:
    head = (
        f"`{title}`: temperature {one['temperature']:g}, lookahead {one['lookahead']}, {one['prompts']} prompts, "
        f"{one['tokens']} tokens, batch {one.get('batch', 1)}, identical: {'yes' if one['identical_all'] else 'no'}\n"
    )
    rows = ["| method | " + " | ".join(name for _, name, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method, row in one["methods"].items():
        cells = ("–" if row.get(key) is None else f"{row[key]:.{digits}f}" for key, _, digits in COLUMNS)
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    return head + "\n" + "\n".join(rows) + "\n\n" + _ratios(one["methods"]) + "\n"


def _ratios(methods: dict[str, Any]) -> str:
    """Returns ratios of tokens per second, and of a round after a hit to its forward."""
    rates = {name: row["tokens_per_second"] for name, row in methods.items() if row["tokens_per_second"]}
    found = [f"{a} / {b} {rates[a] / rates[b]:.2f}" for a, b in RATIOS if a in rates and b in rates]
    ssd = methods.get("ssd", {})
    if ssd.get("hit_round_ms") and ssd.get("forward_ms"):
        found.append(f"round on a hit / forward {ssd['hit_round_ms'] / ssd['forward_ms']:.2f}")
    return f"Ratios: {', '.join(found)}." if found else ""


def _checks(title: str, data: dict[str, Any]) -> str:
    head = f"`{title}`: the simulator, mean error {data['mean_error']:.1%} over {len(data['checks'])} settings\n"
    rows = ["| method | K | N | T | measured tok/s | simulated tok/s | machine | error |", "|---" * 8 + "|"]
    for check in data["checks"]:
        at = check["setting"]
        rows.append(
            f"| {at['method']} | {at['lookahead']} | {at['budget']} | {at['temperature']:g} "
            f"| {check['measured']:.1f} | {check['simulated']:.1f} | {check.get('machine', 1):.2f} "
            f"| {check['error']:+.1%} |"
        )
    return head + "\n" + "\n".join(rows) + "\n"


RULES = (
    ("temperature", "T", "g"),
    ("rule", "rule", ""),
    ("acceptance_rate", "α", ".2f"),
    ("hit_rate", "hits", ".2f"),
    ("acceptance_length", "tokens/round", ".2f"),
    ("bytes_per_round", "bytes/round", ",.0f"),
    ("tokens_per_second", "tok/s", ".0f"),
    ("speedup", "speedup", ".2f"),
    ("round_ms", "round ms", ".2f"),
    ("draft_ms", "draft ms", ".2f"),
)
EQUALITY = ("method", "temperature", "outputs", "equal", "near_ties", "structural", "tokens")


def rules(data: dict[str, Any]) -> str:
    """Returns the table of ``benchmarks/rules.py``: a row for each temperature and rule, and the fastest rules."""
    lines = ["| " + " | ".join(name for _, name, _ in RULES) + " |", "|---|---|" + "---:|" * (len(RULES) - 2)]
    for row in sorted(data["rows"], key=lambda row: row["temperature"]):
        lines.append("| " + " | ".join(format(row[key], form) for key, _, form in RULES) + " |")
    lines.append("")
    for temperature in sorted({row["temperature"] for row in data["rows"]}):
        found = [row for row in data["rows"] if row["temperature"] == temperature]
        best = max(found, key=lambda row: row["speedup"])
        lines.append(f"T = {temperature:g}: {best['rule']} has the largest speedup, {best['speedup']:.2f}.")
    return "\n".join(lines)


def equality(data: dict[str, Any]) -> str:
    """Returns the table of ``benchmarks/equality.py``: a row for each method and temperature."""
    cases = data["cases"]
    lines = [f"{data['prompts']} prompts, {len(cases)} of {data['of']} engines:\n", "| " + " | ".join(EQUALITY) + " |"]
    lines.append("|---" + "|---:" * (len(EQUALITY) - 1) + "|")
    lines += ["| " + " | ".join(f"{group[key]}" for key in EQUALITY) + " |" for group in data["groups"]]
    drafts = {case["weights"]["draft"][:12] for case in cases if "weights" in case}
    if cases[0]["case"].startswith("embedded"):
        lines.append(f"\nThe draft's weights (SHA-256): {', '.join(sorted(drafts))}.")
    return "\n".join(lines)


def chi_square(data: list[dict[str, Any]]) -> str:
    """Returns the table of ``benchmarks/chi_square.py``."""
    from ssd.testing.laws.chi_square import table  # imports torch

    return table(data)


PARTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "equality-tiny": ("equality-tiny.json", equality),
    "equality-embedded": ("equality-embedded.json", equality),
    "chi-square": ("chi_square.json", chi_square),
    "rules": ("rules.json", rules),
}
"""Parts of docs/exactness.md by marker: the file, and what makes its table."""


def between(page: str, begin: str, end: str, text: str) -> str:
    """Returns the page with another text between the markers."""
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def exactness(page: str, folder: Path) -> str:
    """Returns docs/exactness.md with the figures of the folder."""
    for name, (file, write) in PARTS.items():
        if (folder / file).is_file():
            text = write(json.loads((folder / file).read_text(encoding="utf-8")))
            source = f"`benchmarks/results/{file}`\n\n"
            page = between(page, f"<!-- {name}: begin -->", f"<!-- {name}: end -->", source + text + "\n")
    return page


def main(
    results: Annotated[Path, typer.Option(help="Folder with one JSON file for each benchmark.")] = RESULTS,
) -> None:
    """Write the tables of all results into benchmarks/results/README.md and docs/exactness.md."""
    PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), BEGIN, END, tables(results)), encoding="utf-8")
    EXACTNESS.write_text(exactness(EXACTNESS.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
