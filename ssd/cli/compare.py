"""``ssd compare`` and ``ssd certify``: methods on the same prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RequestError
from .options import (
    AS_METHODS,
    ConfigOption,
    JsonOption,
    MaxTokensOption,
    MethodsOption,
    PromptsOption,
    RepeatOption,
    SeedOption,
    SetOption,
    TemperatureOption,
    check_folders,
    makers,
    settings_of,
    workload,
)
from .terminal import STARTING, status, tables, warn_degraded, write_json

if TYPE_CHECKING:
    from ..bench.measure.compare import Comparison


def compare(
    context: typer.Context,
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    prompts: PromptsOption = None,
    methods: MethodsOption = "none,sd,ssd",
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    max_tokens: MaxTokensOption = 128,
    repeat: RepeatOption = 1,
    json_file: JsonOption = None,
    demo: Annotated[bool, typer.Option("--demo", help="The built-in prompts; print the answers too.")] = False,
) -> None:
    """Run the methods on the same prompts; compare tokens and speed.

    Ends with exit code 1 if any method's tokens differ from plain decoding's.
    """
    from ..bench.measure.compare import compare as run
    from ..bench.measure.compare import parse_methods, prepared
    from ..bench.measure.interleave import Runs
    from ..bench.report.comparison_report import print_comparison

    if demo and prompts is not None:
        raise RequestError("--demo brings its own prompts; give --demo or --prompts, not both")
    runs = Runs(temperature=temperature, seed=seed, max_tokens=max_tokens, repeat=repeat)
    chosen, texts = parse_methods(methods), workload(prompts)
    check_folders({"--json": json_file})
    settings = prepared(settings_of(config, overrides, AS_METHODS), chosen)
    with status(STARTING) as show, makers(context).llm(settings) as llm:

        def progress(done: int, total: int, label: str) -> None:
            show(f"{done}/{total} {label}")

        comparison = run(llm, texts, runs, methods=chosen, progress=progress)
        degraded = llm.degraded
    console = tables()
    if demo:
        _print_answers(comparison, console)
    print_comparison(comparison, console)
    warn_degraded(degraded)
    write_json(json_file, comparison.to_json())
    if comparison.identity_promised and not comparison.identical_all:
        raise typer.Exit(1)


def _print_answers(comparison: Comparison, console: Any) -> None:
    for prompt in comparison.prompts:
        console.rule(f"{prompt.category}: {prompt.name}", align="left")
        console.print(prompt.text, style="dim", end="", markup=False, highlight=False, soft_wrap=True)
        answer = comparison.references[prompt.name].text
        console.print(answer, markup=False, highlight=False, soft_wrap=True)
    console.rule()


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


COMMANDS = (compare, certify)
