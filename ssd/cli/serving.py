"""Commands around serving: ``ssd serve``. Added to the ``ssd`` command by ``cli``."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..config.sections import Config
    from ..serving.batch.run import Batch


ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="A YAML file, or the name of a shipped configuration.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one configuration value; repeatable.")
]


def serve(
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    host: Annotated[str | None, typer.Option(help="Address to bind; off loopback a key is required.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 0 takes a free one.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="API keys, one a line.")] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log each HTTP request.")] = False,
) -> None:
    """Serve the OpenAI API, the playground page and the client lane until Ctrl-C."""
    from ..serving.run import serve as run

    given = {"host": host, "port": port, "api_key_file": api_key_file}
    flags = tuple(f"server.{name}={value}" for name, value in given.items() if value is not None)
    settings = _settings(config, overrides, flags)

    def started(url: str) -> None:
        typer.echo(f"listening on {url} (loading the models; the first time on a machine compiles)", err=True)

    asyncio.run(run(settings, started=started, ready=lambda: typer.echo("ready", err=True), access_log=access_log))
    typer.echo("stopped", err=True)


def lane_keys(
    folder: Annotated[Path, typer.Argument(help="Where the keys are, or go.")],
    name: Annotated[str, typer.Argument(help="The client they let in.")] = "client",
) -> None:
    """Make CURVE keys for a client of a lane over TCP."""
    from ..serving.lane.keys import make_keys

    secret = make_keys(folder, name)
    typer.echo(f"give {secret} and {folder / 'server.key'} to the client; the server reads {folder}")


def batch(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help='Requests: OpenAI batch lines, or {"prompt": ...} lines.')
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Results, in the order of the requests.")],
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, whatever is there.")] = False,
) -> None:
    """Run a file of requests. Killed at any moment, the same command goes on where it stopped.

    Lines that cannot work go to OUT.errors with their numbers; exit code 1 then.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from ..serving.batch.run import Progress, first_cause

    job = make_batch(_settings(config, overrides), source, out, restart=restart)
    rate = TextColumn("{task.fields[rate]} tok/s")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeElapsedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=job.progress.total, completed=job.progress.done, rate="–")
        first: list[tuple[float, int]] = []  # when tokens began to flow, and how many there were

        def report(progress: Progress) -> None:
            now = time.monotonic()
            if not first and progress.done > progress.resumed:
                first.append((now, progress.tokens))
            began_s, before = first[0] if first else (now, 0)
            rate = f"{(progress.tokens - before) / (now - began_s):.0f}" if now > began_s else "–"
            bar.update(task, completed=progress.done, rate=rate, description=f"{progress.failed} failed")

        try:
            progress = asyncio.run(job.run(report))
        except BaseExceptionGroup as errors:
            raise first_cause(errors) from None
    typer.echo(
        f"{progress.total} requests, {progress.failed} failed, {progress.resumed} done before, "
        f"{progress.tokens} tokens now: {out}",
        err=True,
    )
    if progress.failed:
        typer.echo(f"what failed: {job.journal.errors}", err=True)
        raise typer.Exit(1)


def make_batch(config: Config, source: Path, out: Path, *, restart: bool) -> Batch:
    """What ``ssd batch`` runs; launchers put their own in its place."""
    from ..serving.batch.run import Batch

    return Batch(config, source, out, restart=restart)


def _settings(config: str, overrides: list[str] | None, extra: tuple[str, ...] = ()) -> Config:
    """The checked configuration; missing models are found before anything is started."""
    from ..config.load import load_config, resolve_model_path

    settings = load_config(config, [*(overrides or ()), *extra])
    for model in (settings.target, settings.draft):
        if model is not None:
            resolve_model_path(model.model)
    return settings


COMMANDS = (serve, batch, lane_keys)
