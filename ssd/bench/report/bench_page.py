"""The figures of ``ssd bench`` as pictures and as one self-contained HTML page."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import Any

import jinja2

from ...pipeline.transport.messages import RoundReport
from ..measure.sweep import BATCH
from .pictures import bars, lines, timeline

TEMPLATE = Path(__file__).with_name("report.html.j2")
LOOKAHEAD, BUDGET = "speculation.lookahead", "speculation.forecast.budget"
TIMELINE_ROUNDS = 16


def rounds_of(data: dict[str, Any]) -> dict[str, list[RoundReport]]:
    """Returns the recorded rounds, by method."""
    return {method: [RoundReport(**one) for one in rounds] for method, rounds in data["settings"][0]["rounds"].items()}


def bench_pictures(data: dict[str, Any]) -> dict[str, bytes]:
    """Returns PNG images by title; there is one for each key that was swept."""
    own = data["settings"][0]
    found = {
        "Tokens per second": bars(
            list(own["methods"]),
            {"tokens per second": [row["tokens_per_second"] or 0.0 for row in own["methods"].values()]},
            "tokens per second",
        )
    }
    survivals = {method: curve for method, row in own["methods"].items() if (curve := _survival(row))}
    if survivals:
        found["Acceptance by position"] = lines(
            survivals, "position in the draft", "share of rounds that accept at least that many tokens"
        )
    for key, title, up, figure in (
        (LOOKAHEAD, "Speed against lookahead", "tokens per second", "tokens_per_second"),
        (BUDGET, "Hit rate against budget", "hit rate", "hit_rate"),
        (BATCH, "Tokens per second against batch", "tokens per second", "tokens_per_second"),
    ):
        curves = _swept(data, key, figure)
        if curves:
            found[title] = lines(curves, key, up)
    for method, rounds in rounds_of(data).items():
        if rounds:
            found[f"Timeline of rounds: {method}"] = timeline(rounds[:TIMELINE_ROUNDS], method)
    return found


def bench_page(data: dict[str, Any]) -> str:
    """Returns the page: a table for every setting, and the pictures, embedded."""
    images = {title: b64encode(png).decode() for title, png in bench_pictures(data).items()}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(data=data, images=images)


def _survival(row: dict[str, Any]) -> dict[float, float] | None:
    counts = row["accepted_histogram"]
    rounds = sum(counts)
    if not row["acceptance_rate"]:
        return None
    return {float(depth): sum(counts[depth:]) / rounds for depth in range(1, len(counts))}


def _swept(data: dict[str, Any], key: str, figure: str) -> dict[str, dict[float | str, float]]:
    curves: dict[str, dict[float | str, float]] = {}
    for setting in data["settings"]:
        if setting["sweep"] != key:
            continue
        for method, row in setting["methods"].items():
            if row[figure] is not None:
                curves.setdefault(method, {})[_number_or_word(setting["value"])] = row[figure]
    return curves


def _number_or_word(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
