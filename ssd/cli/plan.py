"""``ssd plan``: recommendations from a measured profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RequestError
from .options import ConfigOption, JsonOption, PromptsOption, SetOption, check_folders, makers, settings_of, workload
from .terminal import say, status, tables, write_json, write_pictures


def plan(
    context: typer.Context,
    profile: Annotated[Path, typer.Option(help="The profile to read; --measure writes it.")] = Path("profile.json"),
    measure: Annotated[bool, typer.Option("--measure", help="Measure the profile first.")] = False,
    validate: Annotated[bool, typer.Option("--validate", help="Compare simulated and real runs.")] = False,
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    prompts: PromptsOption = None,
    temperatures: Annotated[
        str, typer.Option(metavar="T,T,...", help="Temperatures to measure and to answer for.")
    ] = "0,1",
    json_file: JsonOption = None,
    pictures: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write pictures here, as PNG.")] = None,
) -> None:
    """Recommend lookahead, budget, rows, batch and the division of devices, and say what tokens cost, from a profile.

    --measure starts a few pipelines and writes the profile; --validate starts others and reports
    how far simulated tokens per second are from measured ones.
    """
    from ..bench.report.plan_report import plan_pictures, print_advice, print_checks
    from ..bench.simulate.calibrate import Calibration
    from ..bench.simulate.calibrate import measure as calibrate
    from ..bench.simulate.cost import Prices
    from ..bench.simulate.plan import Validation, advise, mean_error
    from ..bench.simulate.plan import validate as compared
    from ..bench.simulate.profile import load_profile

    launch, heats = makers(context).llm, _temperatures(temperatures)
    check_folders({"--json": json_file, "--profile": profile if measure else None})
    if measure:
        settings, options = settings_of(config, overrides), Calibration(temperatures=heats)
        with status("starting") as show:
            found = calibrate(launch, settings, workload(prompts), options, name=config, say=show)
        profile.write_text(found.model_dump_json() + "\n", encoding="utf-8")
        say(f"written: {profile}")
    found = load_profile(profile)
    answers: dict[str, Any] = {"profile": found.name, "machine": found.machine}
    if validate:
        settings = settings_of(config, overrides)
        with status("starting") as show:
            checks = compared(launch, found, settings, workload(prompts), Validation(temperatures=heats), say=show)
        answers |= {"mean_error": mean_error(checks), "checks": [check.to_json() for check in checks]}
        print_checks(checks, tables())
    else:
        prices = Prices.of(settings_of(config, overrides).cost)
        answers["answers"] = [advise(found, heat, prices=prices) for heat in heats]
        for advice in answers["answers"]:
            print_advice(advice, tables())
    write_json(json_file, answers)
    write_pictures(pictures, lambda: plan_pictures(answers))


def _temperatures(given: str) -> list[float]:
    try:
        found = [float(part) for part in given.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise RequestError(f"--temperatures {given!r} must be numbers >= 0 separated by commas, for example 0,1")
    return found


COMMANDS = (plan,)
