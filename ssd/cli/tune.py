"""Find the settings that are fastest on your prompts. Without a command: speculation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .options import (
    ConfigOption,
    DefaultGroup,
    MaxTokensOption,
    PromptsOption,
    SetOption,
    TemperatureOption,
    check_folders,
    makers,
    settings_of,
    workload,
)
from .terminal import progress_bar, tables

if TYPE_CHECKING:
    from rich.table import Table

    from ..bench.drafts.skip_estimate import Estimator
    from ..bench.drafts.tune_layers import Candidate as LayerCandidate
    from ..bench.simulate.tune import Candidate

RepeatsOption = Annotated[int, typer.Option(min=1, help="Number of measurements.")]
OutOption = Annotated[Path, typer.Option(help="Write the configuration here.")]


class TuneGroup(DefaultGroup):
    """``ssd tune [OPTIONS]`` means ``ssd tune speculation [OPTIONS]``."""

    default = "speculation"


def speculation(
    context: typer.Context,
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    prompts: PromptsOption = None,
    profile: Annotated[
        Path | None, typer.Option(help="A profile by ssd plan --measure; by default one is measured now.")
    ] = None,
    out: OutOption = Path("tuned.yaml"),
    temperature: TemperatureOption = 0.0,
    candidates: Annotated[int, typer.Option(min=1, max=8, help="Settings to measure, after simulating all.")] = 3,
    max_tokens: MaxTokensOption = 128,
    repeat: RepeatsOption = 2,
) -> None:
    """Find lookahead, budget and rows: simulate all, measure the best few in turns, write the configuration."""
    from ..bench.measure.interleave import Runs
    from ..bench.simulate.calibrate import Calibration, measure
    from ..bench.simulate.profile import load_profile
    from ..bench.simulate.tune import measure_candidates, shortlist, tuned_yaml

    settings, texts, launch = settings_of(config, overrides), workload(prompts), makers(context).llm
    runs = Runs(temperature=temperature, max_tokens=max_tokens, repeat=repeat)
    if settings.draft is None:
        raise UsageError("ssd tune needs a configuration with a draft: without one there is nothing to tune")
    check_folders({"--out": out})
    with progress_bar("starting") as show:
        if profile is not None:
            found = load_profile(profile)
        else:
            options = Calibration(temperatures=(temperature,))
            found = measure(launch, settings, texts, options, name=config, say=lambda text: show(0, None, text))
        chosen = shortlist(found, temperature, candidates)
        plain, ranked = measure_candidates(launch, settings, chosen, texts, runs, progress=show)
    console = tables()
    console.print(_speculation_table(ranked, plain, f"temperature {temperature:g}, {len(texts)} prompts"))
    lines = [f"By ssd tune from {config}, temperature {temperature:g}, {len(texts)} prompts of {max_tokens} tokens."]
    lines += [f"plain decoding: {plain:.1f} tok/s"]
    lines += [f"{one.label}: {one.measured or 0:.1f} tok/s (simulated {one.simulated:.1f})" for one in ranked]
    out.write_text(tuned_yaml(settings, ranked[0], "\n".join(lines)), encoding="utf-8")
    console.print(f"written: {out}", markup=False, highlight=False)


def _speculation_table(ranked: Sequence[Candidate], plain: float, title: str) -> Table:
    from ..bench.report.tables import make_table, number

    columns = ("lookahead", "budget", "rows", "simulated tok/s", "measured tok/s", "over plain")
    table = make_table(f"{title}; plain decoding {plain:.1f} tok/s", [], columns)
    for one in ranked:
        rate = one.measured or 0.0
        sizes = (one.size.lookahead, one.size.budget, one.rows)
        over = number(rate / plain if plain else None, 2, "×")
        table.add_row(*map(str, sizes), f"{one.simulated:.1f}", f"{rate:.1f}", over)
    return table


def layers(
    context: typer.Context,
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    prompts: PromptsOption = None,
    out: OutOption = Path("layers.yaml"),
    candidates: Annotated[int, typer.Option(min=1, max=8, help="Skip sets to measure, after estimating many.")] = 3,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each answer that estimates look at.")] = 48,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt in real runs.")] = 64,
    repeat: RepeatsOption = 1,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Time limit: half of it for estimates; no run starts after it.")
    ] = 5.0,
) -> None:
    """Find the sublayers that method self skips: estimate many sets, measure the best few, write the configuration."""
    from ..bench.drafts.skip_estimate import MOST, Estimator
    from ..bench.drafts.tune_layers import layers_yaml, measure, search, shortlist
    from ..bench.measure.interleave import Runs
    from ..config.load import load_config
    from ..engine.front import Front

    texts, launch = workload(prompts), makers(context).llm
    chain = ["speculation.siblings=0", "speculation.rows=null"]
    settings = load_config(settings_of(config, overrides), ["draft=null", "speculation.method=self", *chain])
    runs = Runs(max_tokens=max_tokens, repeat=repeat)
    front, began = Front(settings), time.monotonic()  # checks the configuration
    check_folders({"--out": out})
    with progress_bar("measuring sublayers, decoding the answers", remaining=True) as show:
        room = settings.engine.max_model_len - tokens - 1
        if room < 1:
            raise UsageError(f"--tokens {tokens} does not fit engine.max_model_len={settings.engine.max_model_len}")
        estimator = Estimator(front.plan, [front.tokenize(text.text)[-room:] for text in texts[:MOST]], tokens=tokens)
        half_s = minutes * 30.0

        def searched(label: str) -> None:
            show(time.monotonic() - began, half_s, label)

        search(estimator.of, estimator.layers, deadline_s=began + half_s, progress=searched)
        seen, header = estimator.seen, _layer_costs(estimator)
        chosen = shortlist(seen, candidates)
        del estimator  # releases the target's memory
        ran: list[LayerCandidate] = []
        for number, candidate in enumerate(chosen, start=1):
            if ran and time.monotonic() > began + minutes * 60.0:
                break
            show(0, None, f"starting {number}/{len(chosen)}")
            progress = _numbered(show, f"{number}/{len(chosen)}")
            ran.append(measure(launch, settings, candidate, texts, runs, progress=progress))
    ran.sort(key=lambda one: -(one.speedup or 0.0))
    summary = f"{len(seen)} skip sets estimated, {len(ran)} run on {len(texts)} prompts."
    lines = [f"By ssd tune layers from {config}: {summary}", header]
    rows = [_layer_row(one) for one in ran]
    console = tables()
    console.print(_layers_table(rows, "\n".join(lines)))
    lines += [
        f"skip attention {row[0]}, MLP {row[1]}, K={row[2]}: estimate {row[6]}, measured {row[8]}" for row in rows
    ]
    out.write_text(layers_yaml(settings, ran[0], "\n".join(lines)), encoding="utf-8")
    console.print(f"written: {out}", markup=False, highlight=False)
    if (ran[0].speedup or 0.0) <= 1:
        console.print("plain decoding is faster on these prompts: method self does not help with this target")


def _numbered(show: Callable[[float, float | None, str], None], number: str) -> Callable[[int, int, str], None]:
    return lambda done, total, label: show(done, total, f"{number} {label}")


def _layer_costs(estimator: Estimator) -> str:
    costs = estimator.costs
    return (
        f"Forward of one row {costs.plain * 1e3:.2f} ms: attention {costs.attention * 1e3:.3f} ms and MLP "
        f"{costs.mlp * 1e3:.3f} ms per layer; each further row {costs.row * 1e3:.3f} ms."
    )


def _layer_row(one: LayerCandidate) -> list[str]:
    from ..bench.report.tables import number, yes

    found, skips = one.estimate, one.estimate.skips
    return [
        ",".join(map(str, sorted(skips.attention))) or "–",
        ",".join(map(str, sorted(skips.mlp))) or "–",
        str(found.lookahead),
        f"{found.confidence:g}",
        f"{found.cost:.2f}",
        f"{found.acceptance:.2f}",
        f"{found.speedup:.2f}×",
        number(one.acceptance, 2),
        number(one.speedup, 2, "×"),
        yes(one.identical),
    ]


def _layers_table(rows: Sequence[list[str]], title: str) -> Any:
    from ..bench.report.tables import make_table

    columns = ("attention", "MLP", "K", "stop", "c", "α", "estimate", "α run", "speedup", "identical")
    table = make_table(title, [], columns)
    for row in rows:
        table.add_row(*row)
    return table


COMMANDS = (speculation, layers)
