"""``ssd batch``: decodes a file of requests into a file of results.

A line that cannot work goes to the error file with its number, and the run continues.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...config.load import resolve_model_path
from ...config.sections import Config
from ...engine.async_engine import AHEAD, AsyncEngine
from ...engine.book import Limits
from ...errors import SSDError, UsageError
from ...pipeline.runtime.launch import Pipeline, launch_here
from ...pipeline.runtime.plan import Plan
from ..openai.jobs import model_name
from .journal import Journal, fingerprint
from .lines import Line, read_lines
from .worker import LineWorker

ANSWERING = {
    *("model_name", "chat_template", "chat_template_kwargs", "trust_request_chat_template"),
    *("tool_parser", "reasoning_parser", "unknown_parameters", "long_requests", "request_metrics"),
}
"""Keys of the ``server`` section that answers depend on."""
FLUSH_S = 0.5
"""Seconds between writes of results: a kill costs at most these results and what is being decoded."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """Counts of a run."""

    total: int
    done: int = 0
    failed: int = 0
    resumed: int = 0
    """Lines done in an earlier run."""
    tokens: int = 0
    """Tokens generated in this run."""


class Batch:
    """Runs a file through an engine.

    Args:
        source: the input, JSON lines.
        out: the output file. Errors go to the file beside it whose name ends in ``.errors``.
        restart: discard earlier results.
        launch: makes a running pipeline from a plan.

    Raises:
        UsageError: a file or the configuration cannot work.
    """

    def __init__(
        self,
        config: Config,
        source: Path,
        out: Path,
        *,
        restart: bool = False,
        launch: Callable[[Plan], Pipeline] = launch_here,
    ):
        self._config, self._source = config, source
        self._model = model_name(config)
        self._launch = launch
        total = sum(1 for _ in read_lines(source, self._model))
        if not total:
            raise UsageError(f"{source} has no lines")
        if out.exists() and out.samefile(source):
            raise UsageError(f"{out} is the input; give another output file")
        if not out.parent.is_dir():
            raise UsageError(f"{out}: the folder {str(out.parent)!r} does not exist; create it first")
        self.journal = Journal(out, fingerprint(source, _settings(config)), restart=restart)
        resumed = len(self.journal.done)
        failed = sum(not ok for ok in self.journal.done.values())
        self.progress = Progress(total=total, done=resumed, failed=failed, resumed=resumed)

    async def run(self, report: Callable[[Progress], None] = lambda _progress: None) -> Progress:
        """Decodes the lines without a result, then writes the output.

        Args:
            report: called with the progress twice a second.

        Raises:
            PipelineError: the pipeline broke. Results are kept, and the run can be resumed.
        """
        try:
            if self.progress.done < self.progress.total:
                await self._decode(report)
            self.journal.finish()
            return self.progress
        finally:
            self.journal.close()

    async def _decode(self, report: Callable[[Progress], None]) -> None:
        slots = self._config.engine.max_batch
        limits = Limits(sent=slots + AHEAD)
        engine = AsyncEngine(self._config, launch=self._launch, limits=limits)
        worker = LineWorker(engine, self._model)
        fresh: list[dict[str, Any]] = []
        async with engine:
            room = asyncio.Semaphore(2 * slots + AHEAD)

            async def one(line: Line) -> None:
                try:
                    record = await worker.record(line)
                finally:
                    room.release()
                fresh.append(record)
                self._count(record)

            async def keep() -> None:
                while True:
                    await asyncio.sleep(FLUSH_S)
                    await self._flush(fresh)
                    report(self.progress)

            async with asyncio.TaskGroup() as group:
                keeper = group.create_task(keep())
                try:
                    async with asyncio.TaskGroup() as work:
                        for line in self._left():
                            await room.acquire()
                            work.create_task(one(line))
                finally:
                    keeper.cancel()
            await self._flush(fresh)
            report(self.progress)

    async def _flush(self, fresh: list[dict[str, Any]]) -> None:
        records = fresh[:]
        del fresh[: len(records)]
        if records:
            await asyncio.to_thread(self.journal.add, records)

    def _left(self) -> Iterator[Line]:
        """Yields the lines without a result."""
        return (line for line in read_lines(self._source, self._model) if line.number not in self.journal.done)

    def _count(self, record: dict[str, Any]) -> None:
        self.progress.done += 1
        self.progress.failed += not record["ok"]
        self.progress.tokens += record.pop("tokens")


def _settings(config: Config) -> dict[str, Any]:
    """Returns what the results depend on, beside the input. Speed does not count."""
    folder = resolve_model_path(config.target.model)
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    if config.target.adapter is not None:
        files += sorted(Path(config.target.adapter).expanduser().resolve().glob("adapter_*"))
    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return {
        "version": __version__,
        "target": str(folder.resolve()),
        "weights": weights,
        "dtype": config.target.dtype,
        "kept": config.target.weights,  # packed weights are summed in another order
        "device": config.target.device,
        "numerics": config.numerics,
        # Under the other rules the sampled tokens depend on the drafted ones.
        "rule": None if config.speculation.verify == "coupled" else config.model_dump(include={"speculation", "draft"}),
        "max_model_len": config.engine.max_model_len,
        "server": config.server.model_dump(include=ANSWERING),
        "chat_template_kwargs": config.server.chat_template_kwargs,
        "long_requests": config.server.long_requests,
    }


def first_cause(error: BaseException) -> BaseException:
    """Returns the error that ended a run, out of the exception groups around it."""
    while isinstance(error, BaseExceptionGroup):
        ours: Sequence[BaseException] = [e for e in error.exceptions if isinstance(e, SSDError | BaseExceptionGroup)]
        error = (ours or error.exceptions)[0]
    return error
