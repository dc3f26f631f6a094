"""Results as a short table for the terminal and as plots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = tuple[str, str, str, str]
Parts = dict[str, Any]


def print_table(record: dict[str, Any], skipped: list[str]) -> None:
    """Prints a row for each part; it is the last thing a run prints."""
    facts, table = record["facts"], Table(title=f"stage {record['stage']}", title_justify="left")
    for column in ("part", "what", "measured", "wanted"):
        table.add_column(column)
    for name, part in record["parts"].items():
        for row in _rows(name, part):
            table.add_row(*row)
    console = Console(width=150, soft_wrap=False)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    if skipped:
        console.print(f"not run, no time was left: {', '.join(skipped)}; run the stage again with --have")


def _rows(name: str, part: Parts) -> Iterator[Row]:
    if "error" in part:
        yield name, "error", part["error"][:90], ""
    elif "bytes_per_s" in part:
        yield name, "copy, read + written", f"{part['bytes_per_s'] / 1e9:.0f} GB/s", ""
    elif "tree_ms" in part and "step_ms" in part:
        size = f"{part['parameters'] / 1e9:.2f} B, {part['layers']} layers"
        yield name, f"branch step ({size})", f"{part['step_ms']:.3f} ms, floor {part['step_floor_ms']:.3f}", "<= 0.4 ms"
        yield name, f"tree K={part['lookahead']}", f"{part['tree_ms']:.3f} ms", "< a verify"
    elif "floor_ms" in part:
        share, wider = part["floor_share"], part["verify_over_plain"]
        yield name, "plain forward", f"{part['rows_1_ms']:.3f} ms, {share:.0%} of the floor", ">= 80 % (8b, batch 1)"
        yield name, "verify, 8 rows", f"{part['rows_8_ms']:.3f} ms, {wider:.2f} x plain", "<= 1.10"
    elif "sdpa repeated_ms" in part:
        times = ", ".join(f"{key.removesuffix('_ms')} {value:.3f}" for key, value in part.items() if key != "bytes")
        yield name, "ms", times, ""
    elif "generate_tokens_per_s" in part:
        yield (
            name,
            "generate, assisted",
            f"{part['generate_tokens_per_s']:.1f}, {part['assisted_tokens_per_s']:.1f} tok/s",
            "",
        )
    elif "ssd T=0" in part:
        yield from _engine(name, part)
    else:
        yield name, "ok" if part["ok"] else "WRONG", _wrong(part), "ok"


def _engine(name: str, part: Parts) -> Iterator[Row]:
    for temperature in ("0", "1"):
        rates = {m: part[f"{m} T={temperature}"]["tokens_per_s"] for m in ("none_fast", "none", "sd", "ssd")}
        ssd = part[f"ssd T={temperature}"]
        yield (
            name,
            f"T={temperature} tok/s, {'tokens equal' if part['ok'] else 'TOKENS DIFFER'}",
            ", ".join(f"{method} {rate:.1f}" for method, rate in rates.items())
            + f"; hits {ssd['hit_rate'] or 0:.2f}, ssd/sd {rates['ssd'] / rates['sd']:.2f}",
            "ssd/sd >= 1.15",
        )


def _wrong(part: Parts) -> str:
    return "" if part["ok"] else json.dumps({key: value for key, value in part.items() if key != "cases"})[:300]


def plot(record: dict[str, Any], out: Path) -> list[Path]:
    """Draws bars of the measured times and rates; returns the files (none if nothing was measured)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for title, unit, bars in _charts(record["parts"]):
        figure, axes = pyplot.subplots(figsize=(9, 0.5 + 0.32 * len(bars)), layout="constrained")
        axes.barh([label for label, _ in bars], [value for _, value in bars], color="#4c72b0")
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        facts = record["facts"]
        axes.set_title(f"{title}, {facts.get('card', facts['device'])}, {facts['date']}", loc="left", fontsize=10)
        path = out / f"stage-{record['stage']}-{title.split()[0]}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        made.append(path)
    return made


def _charts(parts: Parts) -> Iterator[tuple[str, str, list[tuple[str, float]]]]:
    found = {name: part for name, part in parts.items() if "error" not in part}
    forwards = [
        (f"{name}, {what}", part[key])
        for name, part in found.items()
        if "floor_ms" in part
        for what, key in (("floor", "floor_ms"), ("1 row", "rows_1_ms"), ("8 rows", "rows_8_ms"))
    ]
    kernels = [
        (f"{name}, {key.removesuffix('_ms')}", value)
        for name, part in found.items()
        if "sdpa repeated_ms" in part
        for key, value in part.items()
        if key != "bytes"
    ]
    rates = [
        (f"{name}, {key}", value["tokens_per_s"])
        for name, part in found.items()
        if "ssd T=0" in part
        for key, value in part.items()
        if isinstance(value, dict)
    ]
    rates += [
        (f"{name}, {key.removesuffix('_tokens_per_s')}", value)
        for name, part in found.items()
        if "generate_tokens_per_s" in part
        for key, value in part.items()
    ]
    for title, unit, bars in (("forwards", "ms", forwards), ("attention", "ms", kernels), ("rates", "tokens/s", rates)):
        if bars:
            yield title, unit, bars
