"""The ``ssd`` command, with its pipelines launched otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import ssd
import ssd.cli.app
import ssd.cli.serving

SHARED = ("--config", "-c", "--set")
"""Options every command has; launchers also take them before the command."""


def run(
    arguments: Sequence[str], *, program: str, llm: Callable[..., Any], batch: Callable[..., Any] | None = None
) -> NoReturn:
    """Run the ``ssd`` command and exit as it does.

    Args:
        llm: makes what the commands use as their ``LLM``. batch: makes what ``ssd batch`` runs.
    """
    # The commands take LLM from the package when they run.
    ssd.LLM = llm  # type: ignore[misc,assignment]
    if batch is not None:
        ssd.cli.serving.make_batch = batch
    ssd.cli.app.app(in_order(arguments), prog_name=program)
    sys.exit()


def in_order(arguments: Sequence[str]) -> list[str]:
    """``--config X generate …`` as the command wants it: ``generate --config X …``."""
    rest = list(arguments)
    leading: list[str] = []
    while rest and (option := rest[0].partition("=")[0]) in SHARED:
        taken = 1 if "=" in rest[0] and option.startswith("--") else 2
        leading += rest[:taken]
        rest = rest[taken:]
    return rest[:1] + leading + rest[1:]
