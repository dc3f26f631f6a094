"""A comparison of methods, for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..measure.compare import Comparison
from .tables import RATES, make_table, number, rates, yes

SHOWN_MISMATCHES = 5


def comparison_table(comparison: Comparison) -> Table:
    """Returns a table with a row for each method."""
    data = comparison.to_json()
    title = (
        f"{data['prompts']} prompts, {data['tokens']} tokens, temperature {data['temperature']:g}, "
        f"seed {data['seed']}, lookahead {data['lookahead']}"
    )
    table = make_table(title, ["method"], [*RATES, "rounds", "round ms", "forward ms", "draft ms"])
    table.add_column("identical")
    for method, row in data["methods"].items():
        counted = comparison.counts(method) and comparison.identity_promised
        table.add_row(
            method,
            *rates(row),
            number(row["rounds"], 0),
            number(row["round_ms"], 2),
            number(row["forward_ms"], 2),
            number(row["draft_ms"], 2),
            yes(row["identical"]) + ("" if counted else " (not counted)"),
        )
    return table


def category_table(comparison: Comparison) -> Table:
    """Returns a table with a row for each category and each method that speculates."""
    _, *without_speed = RATES
    table = make_table(None, ["category", "method"], [*without_speed, "repeated 8-grams"])
    methods = comparison.to_json()["methods"]
    for category in comparison.categories:
        for method, data in methods.items():
            row = data["categories"][category]
            if row["acceptance_rate"] is not None:
                _, *formatted = rates(row)
                table.add_row(category, method, *formatted, number(row["repeated_8gram_share"], 2))
    return table


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints the tables, the first places where tokens differ, and the verdict."""
    console.print(comparison_table(comparison))
    categories = category_table(comparison)
    if categories.row_count and len(comparison.categories) > 1:
        console.print(categories)
    if not comparison.identity_promised:
        console.print(
            f"identical: not promised by speculation.verify={comparison.verify} at temperature "
            f"{comparison.runs.temperature:g}: tokens have the same distribution as plain decoding's but differ"
        )
        return
    counted = [mismatch for mismatch in comparison.mismatches if comparison.counts(mismatch.method)]
    for mismatch in counted[:SHOWN_MISMATCHES]:
        console.print(
            f"{mismatch.method} differs from plain decoding at token {mismatch.position} of prompt "
            f"{mismatch.prompt} (repeat {mismatch.repeat + 1})",
            markup=False,
        )
    if len(counted) > SHOWN_MISMATCHES:
        console.print(f"… and {len(counted) - SHOWN_MISMATCHES} more")
    console.print(f"identical: {yes(comparison.identical_all)}")
