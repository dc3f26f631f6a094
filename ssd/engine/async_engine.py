"""``AsyncEngine``: many concurrent requests over one pipeline, in an asyncio program."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..config.sections import Config
from ..errors import OverloadedError, PipelineError, SSDError, WorkerError
from ..pipeline.runtime.launch import Pipeline, Restartable, launch_here
from ..pipeline.runtime.plan import Plan
from ..pipeline.transport.async_lane import AsyncLane
from ..pipeline.transport.messages import Message, RoundReport, Watch
from ..request.output import RequestOutput, StreamEvent
from ..request.sampling_params import SamplingParams
from .book import Limits, Request
from .front import Front, Taken, taken
from .restarts import News
from .stream import RequestStream

CHECK_S = 0.5
"""How often to see whether the workers live."""
AHEAD = 1
"""Requests the verifier knows beyond its slots, so that none stays empty for a message's way."""
ROUNDS_KEPT = 1024
"""Round reports kept for a watcher that does not keep up; older ones are dropped."""


class Observer(Protocol):
    """Is told what happens, on the loop; must be quick."""

    def event(self, request: Request, event: StreamEvent) -> None: ...

    def round(self, report: RoundReport) -> None: ...


class AsyncEngine:
    """Owns a pipeline. All methods belong to the loop it is started in.

    ::

        async with AsyncEngine("embedded") as engine:
            async for event in engine.submit("def main():", SamplingParams(max_tokens=32)):
                print(event.text)

    Args:
        config, overrides, launch: as for ``LLM``.
        limits: what may be in flight; by default those of the configuration's ``server`` section.

    Raises:
        UsageError: configuration, models or their pairing are wrong.
    """

    def __init__(
        self,
        config: Config | str | Path | dict[str, Any] = "embedded",
        *,
        overrides: Sequence[str] = (),
        launch: Callable[[Plan], Pipeline] = launch_here,
        limits: Limits | None = None,
        observer: Observer | None = None,
    ):
        self._front = Front(config, overrides=overrides)
        self.config, self.tokenizer = self._front.config, self._front.tokenizer
        server = self.config.server
        self._front.book.limits = limits or Limits(
            queue=server.max_queue,
            tokens=server.max_tokens_in_flight,
            sent=self.config.engine.max_batch + AHEAD,
        )
        self._launch, self._observer = launch, observer
        self._pipeline: Pipeline | None = None
        self._lanes: dict[str, AsyncLane] = {}
        self._streams: dict[int, RequestStream] = {}
        self._watchers: set[asyncio.Queue[RoundReport | None]] = set()
        self._watched = False
        self._guard: asyncio.Task[None] | None = None
        self._restarting: asyncio.Future[None] | None = None
        self._changed, self._broken = asyncio.Event(), asyncio.Event()
        self._refusal: str | None = None
        self.failure: SSDError | None = None
        """Why the pipeline is gone, if it is."""

    @property
    def ready(self) -> bool:
        """Workers are up and nothing broke."""
        return self._pipeline is not None and self._front.ready and self.failure is None

    @property
    def degraded(self) -> str | None:
        """Why the draft is not there, if it is not."""
        return self._front.restarts.degraded

    @property
    def restarting(self) -> bool:
        """The draft is lost, and not for good."""
        return self._front.restarts.pending

    def on_draft(self, tell: Callable[[News], None]) -> None:
        """``tell`` hears, on the loop, when the draft is lost, restarting, back or given up."""
        self._front.restarts.tell = tell

    @property
    def queued(self) -> int:
        """Requests that wait here."""
        return self._front.book.queued

    @property
    def running(self) -> int:
        """Requests the verifier has."""
        return self._front.book.sent

    @property
    def tokens_in_flight(self) -> int:
        return self._front.book.tokens

    async def __aenter__(self) -> AsyncEngine:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Launch the pipeline and wait until it can decode.

        Raises: UsageError, WorkerError; everything is taken down again then.
        """
        # Launching may wait for a cluster to have room.
        launching = asyncio.ensure_future(asyncio.to_thread(self._launch, self._front.plan))
        try:
            self._pipeline = pipeline = await asyncio.shield(launching)
        except asyncio.CancelledError:
            with contextlib.suppress(SSDError):  # nobody is there to be told
                await asyncio.to_thread((await launching).close)
            raise
        try:
            for role in pipeline.lanes:
                self._open_lane(pipeline, role)
            if not isinstance(pipeline, Restartable):
                self._front.restarts.limit = 0
            self._guard = asyncio.create_task(self._watch_over(pipeline))
            deadline = time.monotonic() + self.config.engine.start_timeout_s
            while not self._front.ready and self.failure is None:
                self._changed.clear()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._front.late
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), left)
            if self.failure is not None:
                raise self.failure
            self._update_watch()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Stop the workers; what still runs fails. Safe to call twice."""
        if self._guard is not None:
            self._guard.cancel()
        if self._restarting is not None:  # what it starts must be known to be stopped
            await asyncio.wait([self._restarting])
        if self.failure is None:
            self._fail(PipelineError("the engine is closed"))
        for lane in self._lanes.values():
            await lane.close()
        self._lanes = {}
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            await asyncio.to_thread(pipeline.close)

    def submit(
        self, prompt: str | Sequence[int], params: SamplingParams, *, client: str = "", priority: int = 0
    ) -> RequestStream:
        """Start a request.

        Args:
            client: whom it is for: clients take turns when slots are short.
            priority: of those that wait, requests with the lowest value go first, as in vLLM; nothing that
                runs is interrupted. Only with ``engine.scheduling=priority``.

        Raises:
            RequestError: the request cannot work. OverloadedError: too much is in flight.
            PipelineError: the engine is not running.
        """
        self._check()
        return self._add(self._front.make(prompt, params, client, priority))

    async def generate(self, prompt: str | Sequence[int], params: SamplingParams) -> RequestOutput:
        """One request, to its end. Cancelling the call cancels the request."""
        return await self.submit(prompt, params).output()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a prompt, as ``submit`` would make them."""
        return self._front.tokenize(text)

    async def failed(self) -> SSDError:
        """Wait until the pipeline breaks; why it did."""
        await self._broken.wait()
        assert self.failure is not None
        return self.failure

    def take_no_more(self, why: str) -> None:
        """From now on ``submit`` raises; what is in flight goes on."""
        self._refusal = why

    def cancel_all(self) -> None:
        """Give up every request, and end what ``rounds`` tells."""
        for number in list(self._front.book.live):
            self._perform(taken(self._front.book.cancel(number)))
        self._end_watching()

    async def rounds(self) -> AsyncGenerator[RoundReport, None]:
        """Reports of rounds from now on; the verifier makes them while anybody listens or observes."""
        self._check()
        mine: asyncio.Queue[RoundReport | None] = asyncio.Queue(ROUNDS_KEPT)
        self._watchers.add(mine)
        self._update_watch()
        try:
            while (report := await mine.get()) is not None:
                yield report
        finally:
            self._watchers.discard(mine)
            self._update_watch()

    def info(self) -> dict[str, Any]:
        """What the workers said of themselves, by role."""
        return dict(self._front.info)

    def _check(self) -> None:
        if self.failure is not None:
            raise PipelineError(str(self.failure)) from self.failure
        if not self.ready:
            raise PipelineError("the engine is not running; await start() first")
        if self._refusal is not None:
            raise PipelineError(self._refusal)

    def _add(self, requests: list[Request]) -> RequestStream:
        stream = RequestStream(self, requests)
        try:
            for request in requests:
                step = self._front.book.add(request)
                self._streams[request.number] = stream
                self._perform(taken(step))
        except OverloadedError:
            stream.cancel()  # all completions or none
            raise
        return stream

    def _cancel(self, request: Request) -> None:
        self._perform(taken(self._front.book.cancel(request.number)))

    def _take(self, role: str, message: Message) -> None:
        if self.failure is not None:
            return
        try:
            then = self._front.take(role, message)
        except SSDError as error:
            self._fail(error)
            return
        if isinstance(message, RoundReport):
            self._report(message)
        self._changed.set()
        self._perform(then)

    def _perform(self, then: Taken) -> None:
        for request, event in then.events:
            stream = self._streams.get(request.number)
            if event.output is not None:
                self._streams.pop(request.number, None)
            if self._observer is not None:
                self._observer.event(request, event)
            if stream is not None:
                stream._put(event)
        for role, message in then.send:
            self._send(role, message)

    def _send(self, role: str, message: Message) -> None:
        lane = self._lanes.get(role)
        if lane is None or self.failure is not None:
            return
        try:
            lane.send(message)
        except PipelineError as error:
            if role == "verifier":
                self._fail(error)

    def _fail(self, error: SSDError) -> None:
        """The pipeline is gone: everybody who waits is told."""
        if self.failure is not None:
            return
        self.failure = error
        self._front.book.fail()
        streams, self._streams = self._streams, {}
        for stream in dict.fromkeys(streams.values()):
            stream._put(PipelineError(str(error)))
        self._end_watching()
        self._broken.set()
        self._changed.set()

    async def _watch_over(self, pipeline: Pipeline) -> None:
        while self.failure is None:
            await asyncio.sleep(CHECK_S)
            for lane in self._lanes.values():
                lane.look()
            try:
                gone = await asyncio.to_thread(pipeline.check)
            except PipelineError as error:
                self._fail(error)
                return
            if (fatal := self._front.fatal(gone)) is not None:
                self._fail(fatal)
            elif (then := self._front.restart_due(gone)) is not None and isinstance(pipeline, Restartable):
                await self._restart_draft(pipeline, then)

    async def _restart_draft(self, pipeline: Restartable, then: Taken) -> None:
        roles = self._front.config.draft_roles
        for role in roles:
            if (lane := self._lanes.pop(role, None)) is not None:
                await lane.close()

        def restart() -> None:
            for role in roles:
                pipeline.restart(role)

        self._restarting = asyncio.ensure_future(asyncio.to_thread(restart))
        try:
            await asyncio.shield(self._restarting)
        except WorkerError as error:
            self._front.restarts.lost(str(error))
        else:
            for role in roles:
                self._open_lane(pipeline, role)
            self._perform(then)

    def _open_lane(self, pipeline: Pipeline, role: str) -> None:
        self._lanes[role] = AsyncLane(pipeline.lanes[role], lambda message: self._take(role, message), self._fail)

    def _update_watch(self) -> None:
        wanted = bool(self._watchers) or self._observer is not None
        if wanted != self._watched:
            self._watched = wanted
            self._send("verifier", Watch(on=wanted))

    def _report(self, report: RoundReport) -> None:
        if self._observer is not None:
            self._observer.round(report)
        self._tell_watchers(report)

    def _end_watching(self) -> None:
        self._tell_watchers(None)

    def _tell_watchers(self, report: RoundReport | None) -> None:
        for watcher in self._watchers:
            if watcher.full():
                watcher.get_nowait()
            watcher.put_nowait(report)
