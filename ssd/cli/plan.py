"""``ssd plan``: what to run, from a measured profile. Added to the ``ssd`` command by ``cli``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..bench.measure.prompts import Prompt
    from ..bench.simulate.profile import Profile
    from ..config.sections import Config

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="A YAML file, or the name of a shipped configuration.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one configuration value; repeatable.")
]


def plan(
    profile: Annotated[Path, typer.Option(help="Read, or with --measure written.")] = Path("profile.json"),
    measure: Annotated[bool, typer.Option("--measure", help="Measure the profile first.")] = False,
    validate: Annotated[bool, typer.Option("--validate", help="Compare simulated and real runs.")] = False,
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines, to measure on.")] = None,
    temperatures: Annotated[str, typer.Option(metavar="T,T,...", help="Measured and answered for.")] = "0,1",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the answers here.")] = None,
    pictures: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Draw the answers as PNG here.")] = None,
) -> None:
    """Answer from a profile: lookahead, budget, rows, batch, and how to share out devices.

    --measure starts a few pipelines and writes the profile; --validate starts others and reports
    how far simulated tokens per second are from measured ones.
    """
    from rich.console import Console

    from ..bench.report.plan_report import plan_pictures, print_advice, print_checks
    from ..bench.simulate.plan import advise, mean_error
    from ..bench.simulate.plan import validate as run
    from ..bench.simulate.profile import load_profile
    from ..errors import UsageError

    heats = _temperatures(temperatures)
    for path in (json_file, profile if measure else None):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path}: the folder {str(path.parent)!r} does not exist; create it first")
    errors = Console(stderr=True)
    if measure:
        with errors.status("starting") as status:
            found = measured_profile(config, settings_of(config, overrides), workload(prompts), heats, status.update)
        profile.write_text(found.model_dump_json() + "\n", encoding="utf-8")
        typer.echo(f"written: {profile}", err=True)
    found = load_profile(profile)
    # Tables wrapped at 80 columns are no use in a log.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    answers: dict[str, Any] = {"profile": found.name, "machine": found.machine}
    if validate:
        with errors.status("starting") as status:
            checks = run(
                found, settings_of(config, overrides), workload(prompts), temperatures=heats, say=status.update
            )
        answers |= {"mean_error": mean_error(checks), "checks": [check.to_json() for check in checks]}
        print_checks(checks, console)
    else:
        answers["answers"] = [advise(found, heat) for heat in heats]
        for advice in answers["answers"]:
            print_advice(advice, console)
    if json_file is not None:
        json_file.write_text(json.dumps(answers, indent=2) + "\n", encoding="utf-8")
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for name, png in plan_pictures(answers).items():
            (pictures / f"{name}.png").write_bytes(png)


def measured_profile(
    name: str, settings: Config, prompts: Sequence[Prompt], temperatures: Sequence[float], say: Callable[[str], None]
) -> Profile:
    """A profile of the configuration, measured now."""
    from ..bench.simulate.calibrate import measure

    return measure(settings, prompts, name=name, temperatures=temperatures, say=say)


def workload(prompts: Path | None) -> list[Prompt]:
    """The prompts of a file, or the demonstration's."""
    from ..bench.measure.prompts import DEMO_PROMPTS, load_prompts

    return list(DEMO_PROMPTS) if prompts is None else load_prompts(prompts)


def settings_of(config: str, overrides: list[str] | None) -> Config:
    """The checked configuration; missing models are found before anything is started."""
    from ..config.load import load_config, resolve_model_path

    settings = load_config(config, overrides or ())
    for model in (settings.target, settings.draft):
        if model is not None:
            resolve_model_path(model.model)
    return settings


def _temperatures(given: str) -> list[float]:
    from ..errors import RequestError

    try:
        found = [float(part) for part in given.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise RequestError(f"--temperatures {given!r} must be numbers >= 0 with commas between, for example 0,1")
    return found


COMMANDS = (plan,)
