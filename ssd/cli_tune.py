"""``ssd tune``: commands that find settings by measuring. Added to the ``ssd`` command by ``cli``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from .cli_plan import ConfigOption, SetOption, measured_profile, settings_of, workload


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
    """Find lookahead, budget and siblings: simulate all, run the best few in turns, write the configuration."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from .bench.profile import load_profile
    from .bench.tune import measure_candidates, shortlist, tuned_yaml
    from .errors import UsageError

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
    for column in ("lookahead", "budget", "siblings", "simulated tok/s", "measured tok/s", "over plain"):
        table.add_column(column, justify="right")
    for one in ranked:
        rate = one.measured or 0.0
        row = (one.size.lookahead, one.size.budget, one.size.siblings, f"{one.simulated:.1f}", f"{rate:.1f}")
        table.add_row(*map(str, row), f"{rate / plain:.2f}×" if plain else "–")
    console = Console()
    console.print(table)
    lines = [f"By ssd tune from {config}, temperature {temperature:g}, {len(texts)} prompts of {max_tokens} tokens."]
    lines += [f"plain decoding: {plain:.1f} tok/s"]
    lines += [f"{one.label}: {one.measured or 0:.1f} tok/s (simulated {one.simulated:.1f})" for one in ranked]
    out.write_text(tuned_yaml(settings, ranked[0], "\n".join(lines)), encoding="utf-8")
    console.print(f"written: {out}", markup=False, highlight=False)


COMMANDS = (speculation,)
