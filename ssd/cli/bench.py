"""``ssd bench``: measure methods, settings and other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

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
from .terminal import progress_bar, tables, write_json, write_pictures


def bench(
    context: typer.Context,
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    prompts: PromptsOption = None,
    methods: MethodsOption = "none,sd,ssd",
    peers: Annotated[
        str, typer.Option(help="Comma-separated: transformers, transformers-assisted, vllm, vllm-draft.")
    ] = "",
    vllm_python: Annotated[str | None, typer.Option(metavar="PATH", help="Python of vLLM's environment.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=1..6", help="Measure these values of a key too; repeatable.")
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(metavar='"KEY=VALUE ..."', help="A second pipeline with these settings takes turns; repeatable."),
    ] = None,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    max_tokens: MaxTokensOption = 128,
    repeat: RepeatOption = 3,
    json_file: JsonOption = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with pictures here.")] = None,
    pictures: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write the pictures here, as PNG.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a timeline for ui.perfetto.dev here.")
    ] = None,
) -> None:
    """Measure the methods on your prompts, beside other programs on the same weights and cores.

    Ends with exit code 1 if any method's tokens differ from plain decoding's where they must not.
    """
    from ..bench.measure.compare import parse_methods, prepared
    from ..bench.measure.interleave import Runs
    from ..bench.measure.settings import parse_beside, parse_sweep
    from ..bench.measure.sweep import BenchOptions
    from ..bench.measure.sweep import bench as run
    from ..bench.measure.trace import chrome_trace
    from ..bench.peers.adapters import parse_peers
    from ..bench.report.bench_page import bench_page, bench_pictures, rounds_of
    from ..bench.report.bench_report import print_bench

    options = BenchOptions(
        methods=parse_methods(methods),
        peers=parse_peers(peers),
        vllm_python=vllm_python,
        sweeps=[parse_sweep(text) for text in sweep or ()],
        besides=[parse_beside(text) for text in beside or ()],
        runs=Runs(temperature=temperature, seed=seed, max_tokens=max_tokens, repeat=repeat),
    )
    check_folders({"--json": json_file, "--html": html, "--trace": trace})
    settings = prepared(settings_of(config, overrides, AS_METHODS), options.methods)
    with progress_bar("starting") as progress:
        data = run(makers(context).llm, settings, workload(prompts), options, progress=progress)
    print_bench(data, tables())
    write_json(json_file, data)
    if html is not None:
        html.write_text(bench_page(data), encoding="utf-8")
    if trace is not None:
        trace.write_text(json.dumps(chrome_trace(rounds_of(data))), encoding="utf-8")
    write_pictures(pictures, lambda: bench_pictures(data))
    if any(one["identity_promised"] and not one["identical_all"] for one in data["settings"]):
        raise typer.Exit(1)


COMMANDS = (bench,)
