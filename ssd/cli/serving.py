"""``ssd serve``, ``ssd batch`` and ``ssd lane-keys``."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import ConfigOption, SetOption, makers, settings_of
from .terminal import say

if TYPE_CHECKING:
    from ..serving.batch.run import Progress


def serve(
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    host: Annotated[
        str | None, typer.Option(help="Address to bind; any but a loopback address requires an API key.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 0 takes a free one.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with one API key per line.")] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log each HTTP request.")] = False,
) -> None:
    """Serve the OpenAI API, the playground page and the client lane until SIGTERM or Ctrl-C.

    Running requests may finish within server.drain_s; a second signal cuts them.
    """
    from ..serving.run import serve as run

    given = {"host": host, "port": port, "api_key_file": api_key_file}
    flags = [f"server.{name}={value}" for name, value in given.items() if value is not None]
    settings = settings_of(config, [*(overrides or ()), *flags])

    def started(url: str) -> None:
        say(f"listening on {url} (loading the models; the first start on a machine compiles)")

    def draining(requests: int) -> None:
        limit_s = settings.server.drain_s
        say(f"stopping: {requests} requests may finish within {limit_s:g} s (server.drain_s); again to stop now")

    hooks = {"started": started, "ready": lambda: say("ready"), "draining": draining}
    asyncio.run(run(settings, **hooks, access_log=access_log))
    say("stopped")


def lane_keys(
    folder: Annotated[Path, typer.Argument(help="Folder of the keys; created if missing.")],
    name: Annotated[str, typer.Argument(help="Name of the client the keys are for.")] = "client",
) -> None:
    """Make CURVE keys for a client of a lane over TCP."""
    from ..serving.lane.keys import make_keys

    secret = make_keys(folder, name)
    typer.echo(f"give {secret} and {folder / 'server.key'} to the client; the server reads {folder}")


def batch(
    context: typer.Context,
    source: Annotated[
        Path, typer.Argument(metavar="IN", help='Requests: OpenAI batch lines, or {"prompt": ...} lines.')
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Results, in the order of the requests.")],
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard earlier results and start again.")] = False,
) -> None:
    """Run a file of requests. If it is killed, the same command continues where it stopped.

    Lines that fail go to OUT.errors with their numbers; the exit code is 1 then.
    """
    from ..serving.batch.run import first_cause

    job = makers(context).batch(settings_of(config, overrides), source, out, restart=restart)
    try:
        progress = _run(job)
    except BaseExceptionGroup as errors:
        raise first_cause(errors) from None
    say(
        f"{progress.total} requests, {progress.failed} failed, {progress.resumed} done before, "
        f"{progress.tokens} tokens now: {out}"
    )
    if progress.failed:
        say(f"failed lines: {job.journal.errors}")
        raise typer.Exit(1)


def _run(job: Any) -> Progress:
    """Runs the batch under a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    rate = TextColumn("{task.fields[rate]} tok/s")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeElapsedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=job.progress.total, completed=job.progress.done, rate="–")
        first: list[tuple[float, int]] = []  # time and token count when the first request was done

        def report(progress: Progress) -> None:
            now = time.monotonic()
            if not first and progress.done > progress.resumed:
                first.append((now, progress.tokens))
            began_s, before = first[0] if first else (now, 0)
            rate = f"{(progress.tokens - before) / (now - began_s):.0f}" if now > began_s else "–"
            bar.update(task, completed=progress.done, rate=rate, description=f"{progress.failed} failed")

        return asyncio.run(job.run(report))


COMMANDS = (serve, batch, lane_keys)
