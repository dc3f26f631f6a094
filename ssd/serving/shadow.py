"""Shadow replay: decodes a share of finished requests again without speculation, and compares.

It checks exactness in service. A replay has the request's prompt, seed and parameters but ``method="none"``. It starts
only while at least half of the slots are free and nobody waits, and is cancelled (to be tried again) as soon as
somebody waits. Results are counted as ``ssd:shadow_replays_total{result=}``: ``equal``, ``different`` (logged with the
request and the position) or ``dropped`` (too many were due).

Under ``numerics: fast`` a near tie counts as different: telling it from a fault takes the target's logits
(``ssd certify``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from ..config.sections import Config
from ..decoding.sampling import GREEDY_BELOW
from ..engine.async_engine import AsyncEngine
from ..engine.observing import Observer, Observers
from ..engine.request import Caller, Request
from ..engine.restarts import News
from ..errors import OverloadedError, PipelineError
from ..pipeline.runtime.launch import Pipeline, launch_here
from ..pipeline.runtime.plan import Plan
from ..pipeline.transport.messages import RoundReport
from ..request.methods import DRAFTING
from ..request.output import RequestOutput, StreamEvent
from .metrics import Metrics

CLIENT = "ssd.shadow"
"""Client name of replays. No API key has this name, and metrics do not count its requests."""
KEPT = 64
"""Most finished requests that wait for their replay."""
LOOK_S = 0.05
"""Time between two looks at whether there is room, or somebody waits."""

log = logging.getLogger(__name__)


def observed_engine(
    config: Config,
    metrics: Metrics,
    *,
    launch: Callable[[Plan], Pipeline] = launch_here,
    observers: Sequence[Observer] = (),
) -> tuple[AsyncEngine, Shadow]:
    """Returns an engine whose requests are counted, and what replays them as ``server.shadow_rate`` says.

    Needs a running loop.

    Args:
        observers: of the engine, beside the metrics.

    Raises: UsageError: The configuration, the models or their pairing are wrong.
    """
    sample = Sample(metrics, config)
    engine = AsyncEngine(config, launch=launch, observer=Observers(sample, *observers))
    return engine, Shadow(engine, metrics, sample)


class Sample:
    """An engine's observer: updates the metrics, and picks the finished requests to replay."""

    def __init__(self, metrics: Metrics, config: Config):
        self._metrics, self._config = metrics, config
        self.due: asyncio.Queue[tuple[Request, RequestOutput]] = asyncio.Queue(KEPT)
        """Requests to replay, and their outputs."""
        self._random = Random()

    def event(self, request: Request, event: StreamEvent) -> None:
        if request.client == CLIENT:
            return
        self._metrics.event(request, event)
        if event.output is not None and self._picked(request, event.output):
            try:
                self.due.put_nowait((request, event.output))
            except asyncio.QueueFull:
                self._metrics.shadow_replays.labels("dropped").inc()

    def round(self, report: RoundReport) -> None:
        self._metrics.round(report)

    def draft(self, news: News) -> None:
        self._metrics.draft(news)

    def _picked(self, request: Request, output: RequestOutput) -> bool:
        speculation = self._config.speculation
        repeatable = speculation.verify == "coupled" or request.params.temperature < GREEDY_BELOW
        speculated = (request.params.method or speculation.method) in DRAFTING
        whole = output.finish_reason != "cancelled"
        return repeatable and speculated and whole and self._random.random() < self._config.server.shadow_rate


class Shadow:
    """Replays the requests of a sample, one at a time, until closed. Needs a running loop."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics, sample: Sample):
        self._engine, self._metrics, self._sample = engine, metrics, sample
        self._task = asyncio.get_running_loop().create_task(self._replay_due())

    async def close(self) -> None:
        """Stops replaying."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _replay_due(self) -> None:
        while True:
            request, output = await self._sample.due.get()
            plain = None
            while plain is None:
                while self._engine.queued or 2 * self._engine.running >= self._engine.config.engine.max_batch:
                    await asyncio.sleep(LOOK_S)
                try:
                    plain = await self._replay(request)
                except OverloadedError:
                    pass
                except PipelineError:  # the pipeline broke, or is shutting down
                    return
                if plain is None:
                    await asyncio.sleep(LOOK_S)
            self._compare(request, output, plain)

    async def _replay(self, request: Request) -> RequestOutput | None:
        """Returns the request's output without speculation, or None if somebody else had to go first."""
        params = replace(request.params, method="none", logprobs=None, prompt_logprobs=None)
        async with await self._engine.open(request.prompt_ids, params, caller=Caller(client=CLIENT)) as stream:
            answer = asyncio.ensure_future(stream.output())
            try:
                while not (await asyncio.wait({answer}, timeout=LOOK_S))[0]:
                    if self._engine.queued or self._engine.running > self._engine.config.engine.max_batch:
                        return None
                output = answer.result()
            finally:
                answer.cancel()
        if output.finish_reason == "cancelled":
            raise PipelineError("the server cancelled its requests")
        return output

    def _compare(self, request: Request, output: RequestOutput, plain: RequestOutput) -> None:
        ours, theirs = ((o.token_ids, o.text, o.finish_reason) for o in (output, plain))
        self._metrics.shadow_replays.labels("equal" if ours == theirs else "different").inc()
        if ours == theirs:
            return
        pairs = zip(output.token_ids, plain.token_ids, strict=False)
        shorter = min(len(output.token_ids), len(plain.token_ids))
        position = next((at for at, (one, other) in enumerate(pairs) if one != other), shorter)
        log.warning(
            "shadow replay: %s differs from plain decoding at generated token %d (%s, plain %s); seed %d, "
            "temperature %g, method %s",
            request.label or f"request {request.number}",
            position,
            list(output.token_ids[position : position + 1]),
            list(plain.token_ids[position : position + 1]),
            request.params.seed,
            request.params.temperature,
            request.params.method or self._engine.config.speculation.method,
        )
