"""``ssd certify``: check that speculative decoding gives plain decoding's tokens."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import (
    AS_METHODS,
    ConfigOption,
    JsonOption,
    MaxTokensOption,
    PromptsOption,
    SetOption,
    check_folders,
    makers,
    settings_of,
    workload,
)
from .terminal import STARTING, status, tables, write_json


def certify(
    context: typer.Context,
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    prompts: PromptsOption = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; each is compared with none, plain decoding.")
    ] = "sd,ssd",
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="Repeatable. By default 0 and 1, or 0 alone if equal tokens are promised only there."),
    ] = None,
    max_tokens: MaxTokensOption = 128,
    seed: Annotated[int, typer.Option(help="Each prompt's own seed is derived from it.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after end-of-text.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Certify that speculative decoding gives plain decoding's tokens.

    Decodes every prompt plainly and with each method. Where tokens differ, the target's own choice is computed by
    teacher forcing: a near tie lies within the measured numerical band, anything else is structural.
    Exit code 0 only without structural divergences, and under numerics: strict without any.
    The governor is off, so that every method does speculate.
    """
    from ..bench.exactness.certify import check_promise, decode, judge, speculative, trials
    from ..bench.report.certify_report import print_certificate

    settings = settings_of(config, overrides, AS_METHODS)
    temperatures = temperature or ([0.0, 1.0] if settings.speculation.verify == "coupled" else [0.0])
    chosen = speculative([name.strip() for name in methods.split(",") if name.strip()])
    check_promise(settings, temperatures)
    asked = trials(workload(prompts), temperatures, seed=seed, max_tokens=max_tokens, ignore_eos=ignore_eos)
    check_folders({"--json": json_file})
    with status(STARTING) as show, makers(context).llm(settings) as llm:

        def progress(done: int, total: int) -> None:
            show(f"{done}/{total} requests")

        found = decode(llm, asked, chosen, progress=progress)
    certificate = judge(found)  # after the engine has released the target's memory
    print_certificate(certificate, tables())
    write_json(json_file, certificate.to_json())
    if not certificate.passed:
        raise typer.Exit(1)


COMMANDS = (certify,)
