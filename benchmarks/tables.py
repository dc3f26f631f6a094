"""Write the tables of all results into docs/performance.md and docs/exactness.md, between their markers.

python benchmarks/tables.py

docs/exactness.md shows the newest file of each kind: equality*.json (benchmarks/equality.py), chi_square*.json
(chi_square.py) and rules*.json (rules.py); a part without a file stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE / "results" / "README.md"
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
    """Of ``benchmarks/rules.py``: a line per temperature and rule, and which was fastest."""
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
    """Of ``benchmarks/equality.py``: a line per method and temperature."""
    cases = data["cases"]
    lines = [f"{data['prompts']} prompts, {len(cases)} of {data['of']} engines:\n", "| " + " | ".join(EQUALITY) + " |"]
    lines.append("|---" + "|---:" * (len(EQUALITY) - 1) + "|")
    lines += ["| " + " | ".join(f"{group[key]}" for key in EQUALITY) + " |" for group in data["groups"]]
    drafts = {case["weights"]["draft"][:12] for case in cases if "weights" in case}
    if cases[0]["case"].startswith("embedded"):
        lines.append(f"\nThe draft's weights (SHA-256): {', '.join(sorted(drafts))}.")
    return "\n".join(lines)


def chi_square(data: list[dict[str, Any]]) -> str:
    from ssd.testing.laws.chi_square import table  # torch: only where it is needed

    return table(data)


PARTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "equality-tiny": ("equality-tiny*.json", equality),
    "equality-embedded": ("equality-embedded*.json", equality),
    "chi-square": ("chi_square*.json", chi_square),
    "rules": ("rules*.json", rules),
}


def between(page: str, begin: str, end: str, text: str) -> str:
    """The page with another text between its markers."""
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def exactness(page: str, folder: Path) -> str:
    """docs/exactness.md with the newest figures of each kind below the folder."""
    for name, (pattern, write) in PARTS.items():
        files = sorted(folder.glob(f"*/{pattern}"))
        if files:
            text = write(json.loads(files[-1].read_text(encoding="utf-8")))
            source = f"`benchmarks/results/{files[-1].relative_to(folder)}`\n\n"
            page = between(page, f"<!-- {name}: begin -->", f"<!-- {name}: end -->", source + text + "\n")
    return page


def main() -> None:
    """Rewrite the parts of the pages between their markers."""
    folder = HERE / "results"
    PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), BEGIN, END, tables(folder)), encoding="utf-8")
    EXACTNESS.write_text(exactness(EXACTNESS.read_text(encoding="utf-8"), folder), encoding="utf-8")


if __name__ == "__main__":
    main()
