"""A comparison as tables for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..measure.compare import Comparison

SHOWN_MISMATCHES = 5


def comparison_table(comparison: Comparison) -> Table:
    """One line per method."""
    data = comparison.to_json()
    table = Table(
        title=f"{data['prompts']} prompts, {data['tokens']} tokens, temperature {data['temperature']:g}, "
        f"seed {data['seed']}, lookahead {data['lookahead']}",
        title_justify="left",
    )
    table.add_column("method")
    columns = ("tok/s", "speedup", "acceptance", "length", "hits", "rounds", "round ms", "forward ms", "draft ms")
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("identical")
    for method, row in data["methods"].items():
        table.add_row(
            method,
            number(row["tokens_per_second"], 1),
            number(row["speedup"], 2, "×"),
            number(row["acceptance_rate"], 2),
            number(row["acceptance_length"], 2),
            number(row["hit_rate"], 2),
            number(row["rounds"], 0),
            number(row["round_ms"], 2),
            number(row["forward_ms"], 2),
            number(row["draft_ms"], 2),
            ("yes" if row["identical"] else "no")
            + ("" if comparison.counts(method) and comparison.identity_promised else " (not counted)"),
        )
    return table


def category_table(comparison: Comparison) -> Table:
    """One line per method and category, for the methods that speculate."""
    table = Table()
    for column in ("category", "method"):
        table.add_column(column)
    for column in ("speedup", "acceptance", "length", "hits", "repeated 8-grams"):
        table.add_column(column, justify="right")
    methods = comparison.to_json()["methods"]
    for category in comparison.categories:
        for method, data in methods.items():
            row = data["categories"][category]
            if row["acceptance_rate"] is None:
                continue
            table.add_row(
                category,
                method,
                number(row["speedup"], 2, "×"),
                number(row["acceptance_rate"], 2),
                number(row["acceptance_length"], 2),
                number(row["hit_rate"], 2),
                number(row["repeated_8gram_share"], 2),
            )
    return table


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Tables, where tokens differ if they do, and the verdict."""
    console.print(comparison_table(comparison))
    categories = category_table(comparison)
    if categories.row_count and len(comparison.categories) > 1:
        console.print(categories)
    if not comparison.identity_promised:
        console.print(
            f"identical: not promised by speculation.verify={comparison.verify} at temperature "
            f"{comparison.temperature:g}: the tokens have plain decoding's law and are others"
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
    console.print(f"identical: {'yes' if comparison.identical_all else 'no'}")


def number(value: float | None, digits: int, unit: str = "") -> str:
    """A figure for people; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}{unit}"
