"""Shadow replay: a share of finished requests is decoded again, plainly, and compared.

Exactness watched in service. A replay has the request's prompt, seed and parameters but
``method="none"``; it begins only while at least half of the slots are free and nobody waits, and gives
way (to be tried again) as soon as somebody does. Counted as ``ssd:shadow_replays_total{result=}``:
``equal``, ``different`` (logged with the request and the position) or ``dropped`` (too many were due).

Under ``numerics: fast`` a near tie counts as different: telling it from a fault takes the target's
logits (``ssd certify``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from random import Random

from ..config.sections import Config
from ..decoding.sampling import GREEDY_BELOW
from ..engine.async_engine import AsyncEngine
from ..engine.book import Request
from ..errors import OverloadedError, PipelineError
from ..pipeline.runtime.launch import Pipeline, launch_here
from ..pipeline.runtime.plan import Plan
from ..pipeline.transport.messages import RoundReport
from ..request.output import RequestOutput, StreamEvent
from .metrics import Metrics

CLIENT = "ssd.shadow"
"""Whom replays are for; no key has this name, and they are none of the metrics."""
KEPT = 64
"""Finished requests that may be due."""
LOOK_S = 0.05
"""How often to see whether there is room, or somebody to give way to."""

log = logging.getLogger(__name__)


def observed_engine(
    config: Config, metrics: Metrics, *, launch: Callable[[Plan], Pipeline] = launch_here
) -> tuple[AsyncEngine, Shadow]:
    """An engine whose requests are counted, and replayed as ``server.shadow_rate`` says."""
    shadow = Shadow(metrics, config)
    shadow.engine = engine = AsyncEngine(config, launch=launch, observer=shadow)
    return engine, shadow


class Shadow:
    """An engine's observer: tells the metrics, and replays."""

    engine: AsyncEngine

    def __init__(self, metrics: Metrics, config: Config):
        self._metrics, self._config = metrics, config
        self._due: deque[tuple[Request, RequestOutput]] = deque()
        self._random = Random()
        self._task: asyncio.Task[None] | None = None

    def event(self, request: Request, event: StreamEvent) -> None:
        if request.client == CLIENT:
            return
        self._metrics.event(request, event)
        if event.output is not None and self._sampled(request, event.output):
            if len(self._due) >= KEPT:
                self._metrics.shadow_replays.labels("dropped").inc()
                return
            self._due.append((request, event.output))
            if self._task is None or self._task.done():
                self._task = asyncio.get_running_loop().create_task(self._replay_due())

    def round(self, report: RoundReport) -> None:
        self._metrics.round(report)

    async def close(self) -> None:
        """Stop replaying."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _sampled(self, request: Request, output: RequestOutput) -> bool:
        speculation = self._config.speculation
        promised = speculation.verify == "coupled" or request.params.temperature < GREEDY_BELOW
        speculated = (request.params.method or speculation.method) in ("sd", "self", "ssd")
        whole = output.finish_reason != "cancelled"
        return promised and speculated and whole and self._random.random() < self._config.server.shadow_rate

    async def _replay_due(self) -> None:
        while self._due:
            while self.engine.queued or 2 * self.engine.running >= self._config.engine.max_batch:
                await asyncio.sleep(LOOK_S)
            request, output = self._due.popleft()
            try:
                plain = await self._replay(request)
            except OverloadedError:
                plain = None
            except PipelineError:  # broken, or shutting down
                return
            if plain is not None:
                self._compare(request, output, plain)
            else:
                self._due.appendleft((request, output))
                await asyncio.sleep(LOOK_S)

    async def _replay(self, request: Request) -> RequestOutput | None:
        """None: gave way."""
        params = replace(request.params, method="none", logprobs=None)
        async with self.engine.submit(request.prompt_ids, params, client=CLIENT) as stream:
            answer = asyncio.ensure_future(stream.output())
            try:
                while not (await asyncio.wait({answer}, timeout=LOOK_S))[0]:
                    if self.engine.queued or self.engine.running > self._config.engine.max_batch:
                        return None
                output = answer.result()
            finally:
                answer.cancel()
        if output.finish_reason == "cancelled":
            raise PipelineError("the server gave up its requests")
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
            "shadow replay: %s differs from plain decoding at generated token %d (%s, plainly %s); seed %d, "
            "temperature %g, method %s",
            request.label or f"request {request.number}",
            position,
            list(output.token_ids[position : position + 1]),
            list(plain.token_ids[position : position + 1]),
            request.params.seed,
            request.params.temperature,
            request.params.method or self._config.speculation.method,
        )
