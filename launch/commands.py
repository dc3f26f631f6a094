"""The ``ssd`` command with pipelines that a launcher starts."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import NoReturn

from ssd.cli.app import make_app
from ssd.cli.options import Makers

SHARED = ("--config", "-c", "--set")
"""Options of every command; launchers accept them before the command too."""
EXIT_USAGE = 2


def run(arguments: Sequence[str], *, program: str, commands: Collection[str], makers: Makers) -> NoReturn:
    """Runs the ``ssd`` command and exits with its code.

    Args:
        program: name of the launcher, for help and messages.
        commands: those that use ``makers`` alone. Others would start pipelines of this process, and are refused.
        makers: what makes pipelines and batches.
    """
    given = in_order(arguments)
    if given and not given[0].startswith("-") and given[0] not in commands:
        print(f"error: {program} runs {', '.join(commands)}, not {given[0]!r}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    make_app(makers)(given, prog_name=program)
    sys.exit()


def in_order(arguments: Sequence[str]) -> list[str]:
    """Moves options before the command after it: ``--config X generate …`` to ``generate --config X …``."""
    rest = list(arguments)
    leading: list[str] = []
    while rest and (option := rest[0].partition("=")[0]) in SHARED:
        taken = 1 if "=" in rest[0] and option.startswith("--") else 2
        leading += rest[:taken]
        rest = rest[taken:]
    return rest[:1] + leading + rest[1:]
