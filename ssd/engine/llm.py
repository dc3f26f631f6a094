"""``LLM``: prompts in, text out, over a pipeline it launches."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.sections import Config
from ..errors import PipelineError, RequestError, WorkerError
from ..pipeline.runtime.launch import Pipeline, Restartable, launch_here
from ..pipeline.runtime.plan import Plan
from ..pipeline.transport.messages import GetTimings, RoundReport, Watch
from ..request.output import RequestOutput, StreamEvent
from ..request.sampling_params import SamplingParams
from .book import Request
from .front import Front, Taken, taken

POLL_S = 0.2


class LLM:
    """A target–draft pair ready to generate.

    Args:
        config: a shipped configuration's name, a YAML file, or a ``Config``.
        overrides: ``a.b=c`` each. launch: from a plan to a running pipeline; by default
            workers on this machine.

    Raises:
        UsageError: configuration, models or their pairing are wrong.
        WorkerError: a worker did not come up.
    """

    def __init__(
        self,
        config: Config | str | Path | dict[str, Any] = "embedded",
        *,
        overrides: Sequence[str] = (),
        launch: Callable[[Plan], Pipeline] = launch_here,
    ):
        self._front = Front(config, overrides=overrides)
        self.config, self.tokenizer = self._front.config, self._front.tokenizer
        self._events: dict[int, deque[StreamEvent]] = {}
        """Not yet given out, of the requests being streamed."""
        self._checked_s = 0.0
        self._pipeline = launch(self._front.plan)
        if not isinstance(self._pipeline, Restartable):
            self._front.restarts.limit = 0
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def degraded(self) -> str | None:
        """Why the draft is not there, if it is not; one that is restarted comes back while requests run."""
        return self._front.restarts.degraded

    def close(self) -> None:
        """Stop the workers. Safe to call twice."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.close()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt (text, or token ids), in order. With ``n`` > 1 an output is the
        prompt's first completion and ``outputs`` are all of them.

        Raises:
            RequestError: an empty prompt, one too long for the context, or as many parameters
                as there are not prompts. Nothing is started then.
            PipelineError: the pipeline broke.
        """
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(listed)
        else:
            each = list(params)
        if len(each) != len(listed):
            raise RequestError(f"{len(listed)} prompts but {len(each)} sampling parameters")
        groups = [self._front.make(prompt, p) for prompt, p in zip(listed, each, strict=True)]
        requests = [request for group in groups for request in group]
        try:
            for request in requests:
                self._perform(taken(self._front.book.add(request)))
            while any(request.output is None for request in requests):
                self._pump()
        finally:
            self._abandon(requests)
        outputs = [[request.output for request in group if request.output is not None] for group in groups]
        return [replace(first, others=tuple(others)) if others else first for first, *others in outputs]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[StreamEvent]:
        """Events as tokens commit; a completion's last one carries its output. Closing the iterator
        cancels."""
        requests = self._front.make(prompt, params or SamplingParams())
        return self._stream(requests)

    def timings(self, *, reset: bool = False) -> dict[str, float | None]:
        """Medians over recent rounds in ms: ``round_ms``, ``hit_round_ms``, ``forward_ms``, ``draft_ms``."""
        self._front.timings = None
        self._running().lanes["verifier"].send(GetTimings(reset=reset))
        while (timings := self._front.timings) is None:
            self._pump()
        return {
            "round_ms": timings.round_ms,
            "hit_round_ms": timings.hit_round_ms,
            "forward_ms": timings.forward_ms,
            "draft_ms": timings.draft_ms,
        }

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[RoundReport]]:
        """Where the time of every round of the block goes; the list is whole when the block ends."""
        rounds = self._front.rounds = []
        verifier = self._running().lanes["verifier"]
        verifier.send(Watch(on=True))
        try:
            yield rounds
            verifier.send(Watch(on=False))
            self.timings()  # whatever was sent before it has come
        finally:
            self._front.rounds = None

    def info(self) -> dict[str, Any]:
        """What the workers said of themselves, by role."""
        return dict(self._front.info)

    def _running(self) -> Pipeline:
        if self._pipeline is None:
            raise PipelineError("this LLM is closed")
        return self._pipeline

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.config.engine.start_timeout_s
        while not self._front.ready:
            if time.monotonic() > deadline:
                raise self._front.late
            self._pump()

    def _stream(self, requests: list[Request]) -> Iterator[StreamEvent]:
        events: deque[StreamEvent] = deque()
        try:
            for request in requests:
                self._events[request.number] = events
                self._perform(taken(self._front.book.add(request)))
            while any(request.output is None for request in requests):
                self._pump()
                while events:
                    yield events.popleft()
        finally:
            for request in requests:
                self._events.pop(request.number, None)
            self._abandon(requests)

    def _abandon(self, requests: list[Request]) -> None:
        """Those still running are cancelled."""
        for request in requests:
            step = self._front.book.cancel(request.number)
            if step.send and self._pipeline is not None and "verifier" not in self._pipeline.check():
                with contextlib.suppress(PipelineError):
                    self._perform(taken(step))

    def _pump(self) -> None:
        """Take in what the workers sent, waiting a little for the first message."""
        pipeline = self._running()
        seen = False
        for role, lane in pipeline.lanes.items():
            wait_s = POLL_S if role == "verifier" else 0
            while (message := lane.receive(wait_s)) is not None:
                seen, wait_s = True, 0
                self._perform(self._front.take(role, message))
        if not seen or time.monotonic() - self._checked_s > POLL_S:
            gone, self._checked_s = pipeline.check(), time.monotonic()
            error = self._front.fatal(gone)
            if error is not None:
                raise error
            self._restart(pipeline, gone)

    def _restart(self, pipeline: Pipeline, gone: Sequence[str]) -> None:
        """Start a lost draft again, if it is time."""
        then = self._front.restart_due(gone)
        if then is not None and isinstance(pipeline, Restartable):
            try:
                for role in self.config.draft_roles:
                    pipeline.restart(role)
            except WorkerError as error:
                self._front.restarts.lost(str(error))
            else:
                self._perform(then)

    def _perform(self, then: Taken) -> None:
        for request, event in then.events:
            if request.number in self._events:
                self._events[request.number].append(event)
        for role, message in then.send:
            self._running().lanes[role].send(message)
