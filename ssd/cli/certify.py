"""``ssd certify``. Added to the ``ssd`` command by ``cli``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .serving import ConfigOption, SetOption, _settings


def certify(
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines; by default six prompts of code and prose.")] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated; each against none, plain decoding.")] = "sd,ssd",
    temperature: Annotated[
        list[float] | None, typer.Option(help="Repeatable. By default 0 and 1; 0 alone where 1 promises no tokens.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 128,
    seed: Annotated[int, typer.Option(help="The prompts' own seeds derive from it.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after end-of-text.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the certificate here.")
    ] = None,
) -> None:
    """Certify that speculative decoding gives plain decoding's tokens.

    Decodes every prompt plainly and with each method. Where tokens differ, the target is asked by
    teacher forcing: a near tie lies within the measured numerical band, anything else is structural.
    Exit code 0 only with no structural divergence, and with none at all under numerics: strict.
    The governor is off, so that every method does speculate.
    """
    from rich.console import Console

    from ..bench.exactness.certify import check_promise, decode, judge, speculative, trials
    from ..bench.measure.prompts import DEMO_PROMPTS, load_prompts
    from ..bench.report.certify_report import print_certificate

    settings = _settings(config, ["speculation.governor=false", *(overrides or ())])
    temperatures = temperature or ([0.0, 1.0] if settings.speculation.verify == "coupled" else [0.0])
    chosen = speculative([name.strip() for name in methods.split(",") if name.strip()])
    check_promise(settings, temperatures)
    workload = list(DEMO_PROMPTS) if prompts is None else load_prompts(prompts)
    asked = trials(workload, temperatures, seed=seed, max_tokens=max_tokens, ignore_eos=ignore_eos)
    if json_file is not None and not json_file.parent.is_dir():
        raise UsageError(f"--json {json_file}: the folder {str(json_file.parent)!r} does not exist; create it first")

    from ssd import LLM

    console = Console() if sys.stdout.isatty() else Console(width=140)
    with Console(stderr=True).status("starting (the first time on a machine compiles)") as status, LLM(settings) as llm:

        def progress(done: int, total: int) -> None:
            status.update(f"{done}/{total} requests")

        found = decode(llm, asked, chosen, progress=progress)
    certificate = judge(found)  # the engine has given the target's memory back
    print_certificate(certificate, console)
    if json_file is not None:
        json_file.write_text(json.dumps(certificate.to_json(), indent=2) + "\n", encoding="utf-8")
    if not certificate.passed:
        raise typer.Exit(1)


COMMANDS = (certify,)
