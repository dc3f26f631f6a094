"""What the commands run their pipelines with: in this process, or as a launcher provides them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import typer

if TYPE_CHECKING:
    from ..config.sections import Config
    from ..engine.llm import LLM
    from ..serving.batch.run import Batch


class MakeBatch(Protocol):
    """Prepares what ``ssd batch`` runs."""

    def __call__(self, config: Config, source: Path, out: Path, *, restart: bool) -> Batch: ...


def local_llm(config: Config) -> LLM:
    """Starts a pipeline on this machine."""
    from ..engine.llm import LLM

    return LLM(config)


def local_batch(config: Config, source: Path, out: Path, *, restart: bool) -> Batch:
    """Prepares a batch that runs on this machine."""
    from ..serving.batch.run import Batch

    return Batch(config, source, out, restart=restart)


@dataclass(frozen=True, kw_only=True, slots=True)
class Makers:
    """Functions that make what the commands work with."""

    llm: Callable[[Config], LLM] = local_llm
    """Starts a pipeline; what it returns has the methods of ``LLM`` and ends the pipeline when it is left."""
    batch: MakeBatch = local_batch


def makers(context: typer.Context) -> Makers:
    """Returns the makers the running command was given."""
    found = context.find_object(Makers)
    assert found is not None, "make_app puts them into the context"
    return found
