"""``ssd tune``: commands that find settings by measuring. Added to the ``ssd`` command by ``cli``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from .plan import ConfigOption, SetOption, measured_profile, settings_of, workload


class DefaultGroup(TyperGroup):
    """``ssd tune [OPTIONS]`` is ``ssd tune speculation [OPTIONS]``."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["speculation", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=DefaultGroup,
    name="tune",
    help="Find the settings that are fastest on your prompts. Without a command: speculation.",
    rich_markup_mode=None,
)


def speculation(
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines; by default the demonstration's.")] = None,
    profile: Annotated[Path | None, typer.Option(help="By ssd plan --measure; by default it is measured now.")] = None,
    out: Annotated[Path, typer.Option(help="The configuration written.")] = Path("tuned.yaml"),
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    candidates: Annotated[int, typer.Option(min=1, max=8, help="Settings to measure, after simulating all.")] = 3,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Measure so often.")] = 2,
) -> None:
    """Find lookahead, budget and rows: simulate all, run the best few in turns, write the configuration."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from ..bench.simulate.profile import load_profile
    from ..bench.simulate.tune import measure_candidates, shortlist, tuned_yaml
    from ..errors import UsageError

    settings, texts = settings_of(config, overrides), workload(prompts)
    if settings.draft is None:
        raise UsageError("ssd tune needs a configuration with a draft: without one there is nothing to tune")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: the folder {str(out.parent)!r} does not exist; create it first")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)
        found = (
            load_profile(profile)
            if profile is not None
            else measured_profile(
                config, settings, texts, (temperature,), lambda text: bar.update(task, description=text)
            )
        )
        chosen = shortlist(found, temperature, candidates)

        def progress(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label)

        plain, ranked = measure_candidates(
            settings,
            chosen,
            texts,
            temperature=temperature,
            max_tokens=max_tokens,
            repeat=repeat,
            progress=progress,
        )
    table = Table(title=f"temperature {temperature:g}, {len(texts)} prompts; plain decoding {plain:.1f} tok/s")
    for column in ("lookahead", "budget", "rows", "simulated tok/s", "measured tok/s", "over plain"):
        table.add_column(column, justify="right")
    for one in ranked:
        rate = one.measured or 0.0
        row = (one.size.lookahead, one.size.budget, one.rows, f"{one.simulated:.1f}", f"{rate:.1f}")
        table.add_row(*map(str, row), f"{rate / plain:.2f}×" if plain else "–")
    console = Console()
    console.print(table)
    lines = [f"By ssd tune from {config}, temperature {temperature:g}, {len(texts)} prompts of {max_tokens} tokens."]
    lines += [f"plain decoding: {plain:.1f} tok/s"]
    lines += [f"{one.label}: {one.measured or 0:.1f} tok/s (simulated {one.simulated:.1f})" for one in ranked]
    out.write_text(tuned_yaml(settings, ranked[0], "\n".join(lines)), encoding="utf-8")
    console.print(f"written: {out}", markup=False, highlight=False)


def layers(
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines; by default the demonstration's.")] = None,
    out: Annotated[Path, typer.Option(help="The configuration written.")] = Path("layers.yaml"),
    candidates: Annotated[int, typer.Option(min=1, max=8, help="Skip sets to run, after estimating many.")] = 3,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each answer that estimates look at.")] = 48,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt in real runs.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, help="Run so often.")] = 1,
    minutes: Annotated[float, typer.Option(min=0.1, help="Limit: half for estimates; no run begins later.")] = 5.0,
) -> None:
    """Find the sublayers that method self skips: estimate many sets, run the best few, write the configuration."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from ..bench.drafts.skip_estimate import MOST, Estimator
    from ..bench.drafts.tune_layers import Candidate, layers_yaml, measure, search, shortlist
    from ..config.load import load_config
    from ..engine.front import Front
    from ..errors import UsageError

    settings, texts = settings_of(config, overrides), workload(prompts)
    chain = ["speculation.siblings=0", "speculation.rows=null"]
    settings = load_config(settings, ["draft=null", "speculation.method=self", *chain])
    front, began = Front(settings), time.monotonic()  # checks the configuration
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: the folder {str(out.parent)!r} does not exist; create it first")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    errors, console = Console(stderr=True), Console()
    with Progress(*columns, console=errors) as bar:
        task = bar.add_task("measuring sublayers, decoding the answers", total=None)
        room = settings.engine.max_model_len - tokens - 1
        if room < 1:
            raise UsageError(f"--tokens {tokens} does not fit engine.max_model_len={settings.engine.max_model_len}")
        estimator = Estimator(front.plan, [front.tokenize(text.text)[-room:] for text in texts[:MOST]], tokens=tokens)
        half_s = minutes * 30.0
        bar.reset(task, total=half_s)

        def searched(label: str) -> None:
            bar.update(task, completed=time.monotonic() - began, description=label)

        search(estimator.of, estimator.layers, deadline_s=began + half_s, progress=searched)
        seen, costs = estimator.seen, estimator.costs
        chosen = shortlist(seen, candidates)
        del estimator
        ran: list[Candidate] = []
        for number, candidate in enumerate(chosen, start=1):
            if ran and time.monotonic() > began + minutes * 60.0:
                break
            bar.reset(task, total=None, description=f"starting {number}/{len(chosen)}")

            def run(done: int, total: int, label: str, number: int = number) -> None:
                bar.update(task, completed=done, total=total, description=f"{number}/{len(chosen)} {label}")

            ran.append(measure(settings, candidate, texts, max_tokens=max_tokens, repeat=repeat, progress=run))
    ran.sort(key=lambda one: -(one.speedup or 0.0))
    lines = [
        f"By ssd tune layers from {config}: {len(seen)} skip sets estimated, {len(ran)} run on {len(texts)} prompts.",
        f"Forward of one row {costs.plain * 1e3:.2f} ms: attention {costs.attention * 1e3:.3f} ms and MLP "
        f"{costs.mlp * 1e3:.3f} ms a layer; one row more {costs.row * 1e3:.3f} ms.",
    ]
    table = Table(title="\n".join(lines), title_justify="left")
    for column in ("attention", "MLP", "K", "stop", "c", "α", "estimate", "α run", "speedup", "identical"):
        table.add_column(column, justify="right")
    for one in ran:
        found, skips = one.estimate, one.estimate.skips
        row = [
            ",".join(map(str, sorted(skips.attention))) or "–",
            ",".join(map(str, sorted(skips.mlp))) or "–",
            str(found.lookahead),
            f"{found.confidence:g}",
            f"{found.cost:.2f}",
            f"{found.acceptance:.2f}",
            f"{found.speedup:.2f}×",
            "–" if one.acceptance is None else f"{one.acceptance:.2f}",
            "–" if one.speedup is None else f"{one.speedup:.2f}×",
            "yes" if one.identical else "no",
        ]
        table.add_row(*row)
        lines.append(f"skip attention {row[0]}, MLP {row[1]}, K={row[2]}: estimate {row[6]}, measured {row[8]}")
    console.print(table)
    out.write_text(layers_yaml(settings, ran[0], "\n".join(lines)), encoding="utf-8")
    console.print(f"written: {out}", markup=False, highlight=False)
    if (ran[0].speedup or 0.0) <= 1:
        console.print("plain decoding is faster on these prompts: method self does not pay with this target")


COMMANDS = (speculation, layers)
