"""``AsyncEngine``: many concurrent requests over one pipeline, in an asyncio program."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..config.load import load_config
from ..config.sections import Config
from ..errors import PipelineError, SSDError, WorkerError
from ..pipeline.runtime.launch import Pipeline, Restartable, launch_here
from ..pipeline.runtime.plan import Plan
from ..pipeline.transport.async_lane import AsyncLane
from ..pipeline.transport.messages import Message, RoundReport, Watch
from ..request.output import RequestOutput
from ..request.prompts import Prompt
from ..request.sampling_params import SamplingParams
from .book import VERIFIER, Limits, Step
from .front import Front
from .observing import Observer, Watchers
from .request import Caller, Request
from .restarts import News
from .stream import RequestStream

CHECK_S = 0.5
"""Time between two looks at whether the workers live."""
AHEAD = 1
"""Requests the verifier has beyond its slots, so that no slot is empty while a message travels."""
PREPARING_THREADS = 2
"""Requests that are tokenized at once."""
COMPILING_THREADS = 2
"""Requests whose grammars are compiled at once. They have their own threads so that no other request waits for them."""


class AsyncEngine:
    """Owns a pipeline. All methods belong to the loop it is started in.

    ::

        async with AsyncEngine("embedded") as engine:
            stream = await engine.open("def main():", SamplingParams(max_tokens=32))
            async for event in stream:
                print(event.text)

    Args:
        config: As for ``LLM``.
        overrides: As for ``LLM``.
        launch: As for ``LLM``.
        limits: What may be in flight. By default the limits of the configuration's ``server`` section.
        observer: Hears of every event and round.

    Raises:
        UsageError: The configuration, the models or their pairing are wrong.
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
        loaded = load_config(config, overrides)
        self._front = Front(loaded, limits=limits or server_limits(loaded), tell=self._tell_draft)
        self.config, self.tokenizer = self._front.config, self._front.tokenizer
        self.texts = self._front.texts
        self._launch, self._observer = launch, observer
        self._preparing = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="ssd-prepare")
        self._compiling = ThreadPoolExecutor(COMPILING_THREADS, thread_name_prefix="ssd-compile")
        self._pipeline: Pipeline | None = None
        self._lanes: dict[str, AsyncLane] = {}
        self._streams: dict[int, RequestStream] = {}
        self._watchers = Watchers()
        self._watched = False
        self._guard: asyncio.Task[None] | None = None
        self._restarting: asyncio.Future[None] | None = None
        self._changed, self._broken = asyncio.Event(), asyncio.Event()
        self._refusal: str | None = None
        self.failure: SSDError | None = None
        """Why the pipeline is gone, if it is."""

    @property
    def ready(self) -> bool:
        """The workers are up and nothing broke."""
        return self._pipeline is not None and self._front.ready and self.failure is None

    @property
    def accepting(self) -> bool:
        """New requests are taken."""
        return self.ready and self._refusal is None

    @property
    def degraded(self) -> str | None:
        """Why the draft is missing, or None."""
        return self._front.degraded

    @property
    def restarting(self) -> bool:
        """The draft is missing and will be started again."""
        return self._front.restarting

    @property
    def queued(self) -> int:
        """Requests that wait here."""
        return self._front.queued

    @property
    def running(self) -> int:
        """Requests the verifier has."""
        return self._front.running

    @property
    def tokens_in_flight(self) -> int:
        """Prompt tokens and ``max_tokens`` of all requests, waiting or running."""
        return self._front.tokens_in_flight

    async def __aenter__(self) -> AsyncEngine:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Launches the pipeline and waits until it can decode.

        Raises: UsageError, WorkerError: It cannot. Everything is taken down again then.
        """
        # In a thread: launching may wait for a cluster to have room.
        launching = asyncio.ensure_future(asyncio.to_thread(self._launch, self._front.plan))
        try:
            self._pipeline = pipeline = await asyncio.shield(launching)
        except asyncio.CancelledError:
            with contextlib.suppress(SSDError):  # the caller is gone
                await asyncio.to_thread((await launching).close)
            raise
        try:
            self._front.launched(restartable=isinstance(pipeline, Restartable))
            for role in pipeline.lanes:
                self._open_lane(pipeline, role)
            self._guard = asyncio.create_task(self._watch_over(pipeline))
            self._guard.add_done_callback(self._guard_ended)
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
        """Stops the workers. Requests that still run fail. Safe to call twice."""
        if self._guard is not None:
            self._guard.cancel()
        if self._restarting is not None:  # a worker that is being started must be stopped too
            await asyncio.wait([self._restarting])
        if self.failure is None:
            self._fail(PipelineError("the engine is closed"))
        for threads in (self._preparing, self._compiling):
            threads.shutdown(wait=False, cancel_futures=True)
        for lane in self._lanes.values():
            await lane.close()
        self._lanes = {}
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            await asyncio.to_thread(pipeline.close)

    async def open(
        self, prompt: Prompt, params: SamplingParams | None = None, *, caller: Caller | None = None
    ) -> RequestStream:
        """Starts a request. Tokenizing and compiling its grammar happen in a thread, so other requests go on.

        Args:
            prompt: Text, or token ids.
            caller: Who the request is for.

        Raises:
            RequestError: The request cannot be carried out.
            OverloadedError: Too much is in flight; the same request may work later.
            PipelineError: The engine is not running.
        """
        [stream] = await self.open_all([(prompt, params or SamplingParams())], caller=caller)
        return stream

    async def open_all(
        self, asked: Sequence[tuple[Prompt, SamplingParams]], *, caller: Caller | None = None
    ) -> list[RequestStream]:
        """Starts several requests at once, or none of them. Returns their streams, in order.

        Args, raises: As ``open``. The limits count all requests together.
        """
        self._check()
        structured = any(params.structured_outputs is not None for _, params in asked)
        threads = self._compiling if structured else self._preparing
        try:
            groups = await asyncio.get_running_loop().run_in_executor(threads, self._make, asked, caller)
        except asyncio.CancelledError:
            self._check()  # closing the engine cancels what was being prepared
            raise
        self._check()
        step = self._front.submit([request for group in groups for request in group])
        streams = [RequestStream(group, self._cancel) for group in groups]
        self._streams.update((request.number, stream) for stream in streams for request in stream.requests)
        self._perform(step)
        return streams

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput:
        """Runs one request to its end. Cancelling the call cancels the request. Raises: As ``open``."""
        return await (await self.open(prompt, params)).output()

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a prompt, by default as ``open`` makes them.

        Raises: RequestError: It is not valid Unicode.
        """
        return self._front.tokenize(text, add_special_tokens=add_special_tokens)

    async def failed(self) -> SSDError:
        """Waits until the pipeline breaks. Returns why it did."""
        await self._broken.wait()
        assert self.failure is not None
        return self.failure

    def take_no_more(self, why: str) -> None:
        """Refuses requests from now on, with PipelineError. Those in flight go on."""
        self._refusal = why

    def cancel_all(self) -> None:
        """Cancels every request, and ends the iterators of ``rounds``."""
        self._perform(self._front.cancel_all())
        self._watchers.tell(None)

    async def rounds(self) -> AsyncGenerator[RoundReport, None]:
        """Yields reports of rounds from now on. The verifier makes them only while somebody listens or observes."""
        self._check()
        mine = self._watchers.join()
        self._update_watch()
        try:
            while (report := await mine.get()) is not None:
                yield report
        finally:
            self._watchers.leave(mine)
            self._update_watch()

    def info(self) -> dict[str, Any]:
        """Returns what the workers reported about themselves, by role."""
        return dict(self._front.info)

    def _check(self) -> None:
        if self.failure is not None:
            raise PipelineError(str(self.failure)) from self.failure
        if not self.ready:
            raise PipelineError("the engine is not running; await start() first")
        if self._refusal is not None:
            raise PipelineError(self._refusal)

    def _make(self, asked: Sequence[tuple[Prompt, SamplingParams]], caller: Caller | None) -> list[list[Request]]:
        """Runs in a thread."""
        return [self._front.make(prompt, params, caller) for prompt, params in asked]

    def _cancel(self, requests: Sequence[Request]) -> None:
        self._perform(self._front.cancel(requests))

    def _take(self, role: str, message: Message) -> None:
        if self.failure is not None:
            return
        if isinstance(message, RoundReport):
            self._report(message)
            return
        try:
            step = self._front.take(role, message)
        except SSDError as error:
            self._fail(error)
            return
        self._changed.set()
        self._perform(step)

    def _perform(self, step: Step) -> None:
        for request, event in step.events:
            stream = self._streams.get(request.number)
            if event.output is not None:
                self._streams.pop(request.number, None)
            if self._observer is not None:
                self._observer.event(request, event)
            if stream is not None:
                stream.put(event)
        for role, message in step.send:
            self._send(role, message)

    def _send(self, role: str, message: Message) -> None:
        lane = self._lanes.get(role)
        if lane is None or self.failure is not None:
            return
        try:
            lane.send(message)
        except PipelineError as error:
            if role == VERIFIER:
                self._fail(error)

    def _fail(self, error: SSDError) -> None:
        """Takes in that the pipeline is gone. Every stream gets the error."""
        if self.failure is not None:
            return
        self.failure = error
        self._front.fail()
        streams, self._streams = self._streams, {}
        for stream in dict.fromkeys(streams.values()):
            stream.put(PipelineError(str(error)))
        self._watchers.tell(None)
        self._broken.set()
        self._changed.set()

    async def _watch_over(self, pipeline: Pipeline) -> None:
        while self.failure is None:
            await asyncio.sleep(CHECK_S)
            for lane in self._lanes.values():
                lane.look()
            gone = await asyncio.to_thread(pipeline.check)
            if (fatal := self._front.fatal(gone)) is not None:
                self._fail(fatal)
            elif (step := self._front.restart_due(gone)) is not None and isinstance(pipeline, Restartable):
                await self._restart_draft(pipeline, step)

    def _guard_ended(self, guard: asyncio.Task[None]) -> None:
        """Without a guard nobody would notice dead workers, so whatever ended it ends the engine."""
        if guard.cancelled() or (error := guard.exception()) is None:
            return
        if not isinstance(error, SSDError):
            error = WorkerError(f"watching the workers failed: {type(error).__name__}: {error}")
        self._fail(error)

    async def _restart_draft(self, pipeline: Restartable, step: Step) -> None:
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
        except (PipelineError, OSError) as error:
            self._front.restart_failed(error)
        else:
            for role in roles:
                self._open_lane(pipeline, role)
            self._perform(step)

    def _open_lane(self, pipeline: Pipeline, role: str) -> None:
        self._lanes[role] = AsyncLane(pipeline.lanes[role], lambda message: self._take(role, message), self._fail)

    def _tell_draft(self, news: News) -> None:
        if self._observer is not None:
            self._observer.draft(news)

    def _update_watch(self) -> None:
        wanted = bool(self._watchers) or self._observer is not None
        if wanted != self._watched:
            self._watched = wanted
            self._send(VERIFIER, Watch(on=wanted))

    def _report(self, report: RoundReport) -> None:
        if self._observer is not None:
            self._observer.round(report)
        self._watchers.tell(report)


def server_limits(config: Config) -> Limits:
    """Returns the limits of a configuration's ``server`` section."""
    return Limits(
        queue=config.server.max_queue,
        tokens=config.server.max_tokens_in_flight,
        sent=config.engine.max_batch + AHEAD,
    )
