"""``ssd bench``: measure methods and peers. Added to the ``ssd`` command by ``cli``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .plan import ConfigOption, SetOption, settings_of, workload


def bench(
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines, Spec-Bench's too; by default six prompts.")] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated; none and none_fast always run.")] = "none,sd,ssd",
    peers: Annotated[
        str, typer.Option(help="Comma-separated: transformers, transformers-assisted, vllm, vllm-draft.")
    ] = "",
    vllm_python: Annotated[str | None, typer.Option(metavar="PATH", help="Python of vLLM's environment.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=1..6", help="Measure these values too; repeatable.")
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(metavar='"KEY=VALUE .."', help="A pipeline with these settings takes turns; repeatable."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same tokens.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Measure so often; medians are reported.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with pictures here.")] = None,
    pictures: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write the pictures here, PNG.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a timeline for ui.perfetto.dev here.")
    ] = None,
) -> None:
    """Measure the methods, and peers on the same weights and cores, on your prompts.

    Ends with exit code 1 if any method's tokens differ from plain decoding's where they must not.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from ..bench.measure.compare import parse_methods, prepared
    from ..bench.measure.sweep import bench as run
    from ..bench.measure.sweep import parse_beside, parse_sweep
    from ..bench.measure.trace import chrome_trace
    from ..bench.peers.adapters import parse_peers
    from ..bench.report.bench_report import print_bench
    from ..bench.report.page import bench_page, bench_pictures, rounds_of
    from ..errors import UsageError
    from ..request.sampling_params import SamplingParams

    SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens)
    chosen, others, sweeps = parse_methods(methods), parse_peers(peers), [parse_sweep(text) for text in sweep or ()]
    for file in (json_file, html, trace):
        if file is not None and not file.parent.is_dir():
            raise UsageError(f"{file}: the folder {str(file.parent)!r} does not exist; create it first")
    # Methods are measured as such: a governor would turn them into plain decoding where they do not pay.
    settings = prepared(settings_of(config, ["speculation.governor=false", *(overrides or ())]), chosen)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)

        def progress(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label)

        data: dict[str, Any] = run(
            settings,
            workload(prompts),
            methods=chosen,
            peers=others,
            vllm_python=vllm_python,
            sweeps=sweeps,
            besides=[parse_beside(text) for text in beside or ()],
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            repeat=repeat,
            progress=progress,
        )
    print_bench(data, Console() if sys.stdout.isatty() else Console(width=140))
    if json_file is not None:
        json_file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    if html is not None:
        html.write_text(bench_page(data), encoding="utf-8")
    if trace is not None:
        trace.write_text(json.dumps(chrome_trace(rounds_of(data))), encoding="utf-8")
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for title, png in bench_pictures(data).items():
            (pictures / f"{title.lower().replace(': ', '-').replace(' ', '-')}.png").write_bytes(png)
    if any(one["identity_promised"] and not one["identical_all"] for one in data["settings"]):
        raise typer.Exit(1)


COMMANDS = (bench,)
