"""Write the tables of all results into docs/performance.md, between its markers.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
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
    """Markdown for every figures file below the folder, newest folder first."""
    parts = []
    for day in sorted((path for path in folder.iterdir() if path.is_dir()), reverse=True):
        written = [text for file in sorted(day.glob("*.json")) for text in _file(file)]
        if written:
            parts.append(f"### {day.name}\n\n" + "\n".join(written))
    return "\n".join(parts)


def _file(file: Path) -> Iterator[str]:
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict):  # of another command
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
    """Tokens per second of one over another's, and a hit's round over its forward."""
    rates = {name: row["tokens_per_second"] for name, row in methods.items() if row["tokens_per_second"]}
    found = [f"{a} / {b} {rates[a] / rates[b]:.2f}" for a, b in RATIOS if a in rates and b in rates]
    ssd = methods.get("ssd", {})
    if ssd.get("hit_round_ms") and ssd.get("forward_ms"):
        found.append(f"round on a hit / forward {ssd['hit_round_ms'] / ssd['forward_ms']:.2f}")
    return f"Ratios: {', '.join(found)}." if found else ""


def _checks(title: str, data: dict[str, Any]) -> str:
    head = f"`{title}`: the simulator, mean error {data['mean_error']:.1%} over {len(data['checks'])} settings\n"
    rows = ["| method | K | N | T | measured tok/s | simulated tok/s | error |", "|---|---|---|---|---|---|---|"]
    for check in data["checks"]:
        at = check["setting"]
        rows.append(
            f"| {at['method']} | {at['lookahead']} | {at['budget']} | {at['temperature']:g} "
            f"| {check['measured']:.1f} | {check['simulated']:.1f} | {check['error']:+.1%} |"
        )
    return head + "\n" + "\n".join(rows) + "\n"


def main() -> None:
    """Rewrite the part of the page between the markers."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(HERE / 'results')}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
