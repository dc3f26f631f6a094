"""What commands write to the terminal: tables to stdout, progress and warnings to stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

LOG_COLUMNS = 140
"""Width of tables that do not go to a terminal; rich's default of 80 wraps them."""
STARTING = "starting (the first start on a machine compiles, which takes a minute)"


def tables() -> Console:
    """Returns the console for tables, on stdout."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=LOG_COLUMNS)


@contextlib.contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Shows a line on stderr that the yielded function changes."""
    from rich.console import Console

    with Console(stderr=True).status(text) as line:
        yield line.update


@contextlib.contextmanager
def progress_bar(label: str, *, remaining: bool = False) -> Iterator[Callable[[float, float | None, str], None]]:
    """Shows a progress bar on stderr; the yielded function takes the amount done, the total and a label.

    Args:
        remaining: show the time left instead of the time elapsed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    time = TimeRemainingColumn() if remaining else TimeElapsedColumn()
    with Progress(TextColumn("{task.description}"), BarColumn(), time, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)

        def show(done: float, total: float | None, text: str) -> None:
            if total is None:
                bar.reset(task, total=None, description=text)
            else:
                bar.update(task, completed=done, total=total, description=text)

        yield show


def say(text: str) -> None:
    """Writes a line to stderr."""
    typer.echo(text, err=True)


def warn_degraded(degraded: str | None) -> None:
    """Warns if the draft was lost, and why: the tokens are right but the speed is plain decoding's."""
    if degraded:
        say(f"warning: without a draft: {' '.join(degraded.split())}")


def write_json(file: Path | None, data: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Writes the data to the file, if one is given."""
    if file is not None:
        file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def write_pictures(folder: Path | None, pictures: Callable[[], dict[str, bytes]]) -> None:
    """Writes PNG images by name into the folder, if one is given."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, png in pictures().items():
            (folder / f"{name.lower().replace(': ', '-').replace(' ', '-')}.png").write_bytes(png)
