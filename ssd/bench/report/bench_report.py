"""What ``ssd bench`` found, as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .tables import number


def print_bench(data: dict[str, Any], console: Console) -> None:
    """A table for every setting, categories apart in the first."""
    for one in data["settings"]:
        title = f"{one['sweep']} = {one['value']}" if one["sweep"] else "as configured"
        tree = f"rows {one['rows']}" if one.get("rows") else f"siblings {one['siblings']}"
        sizes = f"lookahead {one['lookahead']}, {tree}, budget {one['budget']}, batch {one['batch']}"
        console.print(_table(f"{title}: {sizes}, temperature {one['temperature']:g}", one["methods"]))
        categories = next(iter(one["methods"].values()))["categories"]
        if not one["sweep"] and len(categories) > 1:
            for category in categories:
                parts = {method: row["categories"][category] for method, row in one["methods"].items()}
                console.print(_table(category, parts))
        if one["identity_promised"]:
            console.print(f"identical: {'yes' if one['identical_all'] else 'no'}")
        if one["degraded"]:
            console.print(f"warning: without a draft: {' '.join(one['degraded'].split())}", markup=False)
    for name, reason in data["skipped"].items():
        console.print(f"not measured: {name}: {reason}", markup=False)


def _table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for column in ("tok/s", "speedup", "acceptance", "length", "hits", "round ms", "forward ms", "draft ms"):
        table.add_column(column, justify="right")
    for method, row in rows.items():
        table.add_row(
            method,
            number(row["tokens_per_second"], 1),
            number(row["speedup"], 2, "×"),
            number(row["acceptance_rate"], 2),
            number(row["acceptance_length"], 2),
            number(row["hit_rate"], 2),
            number(row.get("round_ms"), 2),
            number(row.get("forward_ms"), 2),
            number(row.get("draft_ms"), 2),
        )
    return table
