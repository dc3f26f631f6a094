"""``ssd batch`` on a cluster: Ray Data distributes the lines, a pool of pipelines in actors decodes them.

Formats, journal and resuming are those of ``ssd.serving.batch``: the driver writes results to the same synced
shards, so a run may begin on one machine and finish on a cluster. A kill costs the lines in flight: a few times
``engine.max_batch`` for every replica.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# (Ray creates exceptions at run time.)
from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import ray
import ray.data

from ..config.sections import Config
from ..engine.async_engine import AHEAD, AsyncEngine
from ..engine.book import Limits
from ..errors import PipelineError, SSDError, UsageError, WorkerError
from ..pipeline.runtime.launch import Pipeline
from ..pipeline.runtime.plan import Plan
from ..serving.batch.lines import Line
from ..serving.batch.run import Batch, Progress
from ..serving.batch.worker import LineWorker
from ..serving.openai.jobs import model_name
from .actors import PLACEMENT_TIMEOUT_S
from .cores import CoreLease
from .placement import Bundle, Placement, bundles, on_gpu, reason

TASKS = 3
"""Chunks that a replica has at a time: while one runs out, the others keep its slots busy."""
CHUNK_SLOTS = 2
"""Lines of a chunk for each slot of a replica."""
MAX_CHUNKS = 5_000
"""Chunks of a run, for each of which Ray Data keeps a block. Larger runs have longer chunks instead."""
TRIES = 3
"""Pipelines that may break over one chunk before the run ends."""


class BatchReplica:
    """A pipeline in an actor. Its workers are local processes that use the actor's resources.

    Ray restarts an actor that dies and assigns its chunks again. The replica itself replaces a pipeline that
    broke, and an idle one that lost its draft.
    """

    def __init__(self, config: Config, launch: Callable[[Plan], Pipeline]):
        self._lease = CoreLease()  # held until this process ends
        self._config = with_own_gpus(self._lease.leased(config, "target", "draft"))
        self._launch = launch
        self._engine: AsyncEngine | None = None
        self._changing = asyncio.Lock()
        self._busy = 0

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Decodes one chunk.

        Args:
            batch: ``lines``: one chunk as JSON.

        Returns:
            ``records``: the chunk's records as JSON, or an object with the ``error`` that ended it (Ray Data
            would turn an exception into a traceback).
        """
        [chunk] = batch["lines"]
        lines = [Line(**fields) for fields in json.loads(chunk)]
        try:
            answer: Any = await self._decode(lines)
        except SSDError as error:
            answer = {"error": str(error), "usage": isinstance(error, UsageError)}
        return {"records": [json.dumps(answer)]}

    async def _decode(self, lines: list[Line]) -> list[dict[str, Any]]:
        for left in reversed(range(TRIES)):
            engine = await self._running()
            worker = LineWorker(engine, model_name(self._config))
            self._busy += 1
            try:
                return await asyncio.gather(*(worker.record(line) for line in lines))
            except PipelineError:
                if not left:
                    raise
            finally:
                self._busy -= 1
        raise AssertionError

    async def _running(self) -> AsyncEngine:
        async with self._changing:
            engine = self._engine
            lost = engine is not None and engine.degraded is not None and not engine.restarting
            if engine is not None and engine.failure is None and (self._busy or not lost):
                return engine
            if engine is not None:
                await engine.close()
            limits = Limits(sent=self._config.engine.max_batch + AHEAD)
            self._engine = engine = AsyncEngine(self._config, launch=self._launch, limits=limits)
            await engine.start()
            return engine


class RayBatch(Batch):
    """Runs a file through replicas in the cluster this process has joined.

    Args:
        replicas: the largest number of pipelines; fewer run if the cluster has less room.
        timeout_s: how long to wait for room for the first one.
        args, more: as for ``Batch``.

    Raises:
        UsageError: a file or the configuration cannot work.
        WorkerError: from ``run``: there was no room in time, or a replica failed.
    """

    def __init__(
        self, config: Config, *args: Any, replicas: int = 1, timeout_s: float = PLACEMENT_TIMEOUT_S, **more: Any
    ):
        super().__init__(config, *args, **more)
        self._replicas, self._timeout_s = replicas, timeout_s

    async def _decode(self, report: Callable[[Progress], None]) -> None:
        report(self.progress)
        for records in self._records():
            for record in records:
                self._count(record)
            self.journal.add(records)
            report(self.progress)
            await asyncio.sleep(0)  # lets Ctrl-C through

    def _records(self) -> Iterator[list[dict[str, Any]]]:
        """Yields the records of each chunk as it finishes. Raises: UsageError, WorkerError: a replica failed."""
        room = one_bundle(self._config)
        Placement.reserve({"pipeline": room}, strategy="STRICT_PACK", timeout_s=self._timeout_s).release()
        left = self.progress.total - self.progress.done
        size = max(CHUNK_SLOTS * self._config.engine.max_batch, math.ceil(left / MAX_CHUNKS))
        rest, chunks = self._left(), []
        while chunk := [dataclasses.asdict(line) for line in islice(rest, size)]:
            chunks.append({"lines": json.dumps(chunk)})
        _quiet()
        dataset = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
            BatchReplica,
            fn_constructor_kwargs={"config": self._config, "launch": self._launch},
            batch_size=1,
            batch_format="numpy",
            num_cpus=room["CPU"],
            num_gpus=room.get("GPU", 0),
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=self._replicas,
                initial_size=self._replicas,
                max_tasks_in_flight_per_actor=TASKS,
                max_concurrent_calls_per_actor=TASKS,
            ),
        )
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
                for answer in map(json.loads, batch["records"]):
                    if isinstance(answer, dict):
                        raise (UsageError if answer["usage"] else WorkerError)(answer["error"])
                    yield answer
        except ray.exceptions.RayError as error:
            raise WorkerError(f"a replica failed: {reason(error)}") from error


def one_bundle(config: Config) -> Bundle:
    """Returns the resources of all workers of a pipeline together."""
    total: Counter[str] = Counter()
    for bundle in bundles(config).values():
        total.update(bundle)
    return dict(total)


def with_own_gpus(config: Config) -> Config:
    """Returns the configuration with the GPUs that Ray assigned to an actor: numbered from 0, the verifier's first."""
    changed, number = {}, 0
    for name in ("target", "draft"):
        model = getattr(config, name)
        if model is not None and on_gpu(model):
            changed[name] = model.model_copy(update={"device": f"cuda:{number}"})
            number += 1
    return config.model_copy(update=changed)


def _quiet() -> None:
    """Turns Ray Data's own progress output off: the batch reports its progress."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
