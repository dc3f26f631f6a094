"""The figures of ``ssd bench``, for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .tables import RATES, make_table, number, one_line, rates, yes


def print_bench(data: dict[str, Any], console: Console) -> None:
    """Prints a table for every setting; for the configuration as given also one for each category."""
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
            console.print(f"identical: {yes(one['identical_all'])}")
        if one["degraded"]:
            console.print(f"warning: without a draft: {one_line(one['degraded'])}", markup=False)
    for name, reason in data["skipped"].items():
        console.print(f"not measured: {name}: {reason}", markup=False)


def _table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    table = make_table(title, ["method"], [*RATES, "round ms", "forward ms", "draft ms"])
    for method, row in rows.items():
        times = (number(row.get(name), 2) for name in ("round_ms", "forward_ms", "draft_ms"))
        table.add_row(method, *rates(row), *times)
    return table
