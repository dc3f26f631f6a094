"""``ssd compare``: methods on the same prompts."""

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


COMMANDS = (compare,)
