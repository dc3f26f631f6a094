"""The simulator's answers as tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ...request.methods import WITH_DRAFT
from ..simulate.plan import Check, mean_error
from .pictures import bars, lines
from .tables import make_table, number

FIGURES = ("tok/s", "over none_fast", "tokens/round", "hits", "round ms", "verifier busy", "draft busy")


def print_advice(advice: dict[str, Any], console: Console) -> None:
    """Prints the best settings, alone, by batch and by number of devices, at one temperature."""
    plain = advice["none_fast"]["tokens_per_second"]
    table = make_table(f"temperature {advice['temperature']:g}: best settings (simulated)", ["setting"], FIGURES)
    for one in [*advice["best"], advice["sd"], advice["none_fast"]]:
        _add(table, _name(one["setting"]), one, plain)
    console.print(table)
    table = make_table("batch", ["sequences, setting"], FIGURES)
    for batch, methods in advice["batch"].items():
        base = methods["none_fast"]["tokens_per_second"]
        for one in methods.values():
            _add(table, f"{batch}, {_name(one['setting'])}", one, base)
    console.print(table)
    title = "devices (tensor parallelism as measured, or assumed by the profile)"
    table = make_table(title, ["devices, setting"], FIGURES)
    for count, shares in advice["devices"].items():
        for one in shares[:2]:
            _add(table, f"{count}: {_name(one['setting'])}{_places(one['setting'])}", one, plain)
    console.print(table)
    _print_cost(advice["cost"], console)


def _print_cost(cost: dict[str, Any], console: Console) -> None:
    money = cost["prices"]["currency"]
    columns = ("target device-s", "draft device-s", money, "of plain", "tokens/round", "break-even", "break-even α")
    table = make_table("cost of a million tokens (simulated)", ["sequences, setting"], columns)
    for batch, methods in cost["batch"].items():
        for one in methods.values():
            even = one.get("break_even", {})
            table.add_row(
                f"{batch}, {_name(one['setting'])}",
                number(one["target_device_seconds"], 0),
                number(one["draft_device_seconds"], 0),
                number(one["money"], 3),
                number(one["over_plain"], 2, "×"),
                number(one["acceptance_length"], 2),
                number(even.get("acceptance_length"), 2),
                number(even.get("acceptance"), 2),
            )
    console.print(table)
    for source, told in cost["sources"].items():
        if told:
            console.print(f"{source}: {'; '.join(told)}", highlight=False)


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """Prints measured and simulated rates side by side."""
    title = f"mean error {mean_error(checks):.1%} over {len(checks)} settings"
    table = make_table(title, ["setting", "T"], ["measured tok/s", "simulated tok/s", "machine", "error"])
    for check in checks:
        name, heat = _name(check.to_json()["setting"]), f"{check.setting.temperature:g}"
        rates = (f"{check.measured:.1f}", f"{check.simulated:.1f}", f"{check.machine:.2f}×")
        table.add_row(name, heat, *rates, f"{check.error:+.1%}")
    console.print(table)


def plan_pictures(answers: dict[str, Any]) -> dict[str, bytes]:
    """Returns PNG images by file name."""
    found: dict[str, bytes] = {}
    for advice in answers.get("answers", ()):
        heat = f"T{advice['temperature']:g}"
        curves = {m: _curve(points) for m, points in advice["by_lookahead"].items()}
        found[f"plan-lookahead-{heat}"] = lines(curves, "lookahead K", "tokens per second (simulated)")
        hits = {"ssd": _curve(advice["hit_rate_by_budget"])}
        found[f"plan-budget-{heat}"] = lines(hits, "budget N", "hit rate")
        batch = {
            method: {float(b): methods[method]["tokens_per_second"] for b, methods in advice["batch"].items()}
            for method in ("none_fast", *WITH_DRAFT)
        }
        found[f"plan-batch-{heat}"] = lines(batch, "batch", "tokens per second (simulated)")
        scaling: dict[str, dict[float, float]] = {}
        for count, shares in advice["devices"].items():
            for one in shares:
                method, rate = one["setting"]["method"], one["tokens_per_second"]
                best = scaling.setdefault(method, {})
                best[float(count)] = max(best.get(float(count), 0.0), rate)
        found[f"plan-devices-{heat}"] = lines(scaling, "devices", "tokens per second (simulated)")
    if checks := answers.get("checks"):
        names = [f"{_name(c['setting'])} T={c['setting']['temperature']:g}" for c in checks]
        pairs = {"measured": [c["measured"] for c in checks], "simulated": [c["simulated"] for c in checks]}
        found["plan-validation"] = bars(names, pairs, "tokens per second")
    return found


def _add(table: Table, name: str, one: dict[str, Any], plain: float) -> None:
    table.add_row(
        name,
        number(one["tokens_per_second"], 1),
        number(one["tokens_per_second"] / plain, 2, "×"),
        number(one["acceptance_length"], 2),
        number(one["hit_rate"], 2),
        number(one["round_ms"], 2),
        f"{one['verifier_busy']:.0%}",
        f"{one['draft_busy']:.0%}",
    )


def _name(setting: dict[str, Any]) -> str:
    method = setting["method"]
    if method not in WITH_DRAFT:
        return method
    tree = f"K={setting['lookahead']}" + (
        f" W={setting['rows']}" if (setting["rows"] or 0) > setting["lookahead"] + 1 else ""
    )
    return f"{method} {tree}" + (f" N={setting['budget']}" if method == "ssd" else "")


def _places(setting: dict[str, Any]) -> str:
    draft = f" + {setting['draft_devices']} draft" if setting["method"] == "ssd" else ""
    return f", {setting['target_devices']} target{draft}"


def _curve(points: dict[str, float | None]) -> dict[float, float]:
    return {float(at): value for at, value in points.items() if value is not None}
