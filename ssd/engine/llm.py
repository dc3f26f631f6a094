"""``LLM``: prompts in, text out, over a pipeline it launches."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config.sections import Config
from ..errors import PipelineError
from ..pipeline.runtime.launch import Pipeline, Restartable, launch_here
from ..pipeline.runtime.plan import Plan
from ..pipeline.transport.messages import GetTimings, Message, RoundReport, Timings, Watch
from ..request import prompts as asked
from ..request.output import RequestOutput, StreamEvent
from ..request.prompts import Prompt, Prompts
from ..request.sampling_params import SamplingParams
from .book import VERIFIER, Step
from .front import Front
from .request import Request

POLL_S = 0.2


class LLM:
    """A target–draft pair ready to generate. Not for several threads at once.

    Args:
        config: A shipped configuration's name, a YAML file, or a ``Config``.
        overrides: ``a.b=c`` each.
        launch: Makes a running pipeline from a plan. By default its workers run on this machine.

    Raises:
        UsageError: The configuration, the models or their pairing are wrong.
        WorkerError: A worker did not come up.
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
        """Events not yet given out, by number of the requests being streamed."""
        self._timings: Timings | None = None
        self._rounds: list[RoundReport] | None = None
        """Reports of all rounds, while ``watch`` collects them."""
        self._checked_s = 0.0
        self._pipeline: Pipeline | None = launch(self._front.plan)
        self._front.launched(restartable=isinstance(self._pipeline, Restartable))
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
        """Why the draft is missing, or None. A draft that is being restarted comes back while requests run."""
        return self._front.degraded

    def close(self) -> None:
        """Stops the workers. Safe to call twice."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.close()

    def generate(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Completes every prompt and returns the outputs in order. With ``n`` > 1 an output is the prompt's first
        completion, and its ``outputs`` are all of them.

        Args:
            prompts: A text, a list of token ids, or a list of either.
            params: For all prompts, or one for each.

        Raises:
            RequestError: A prompt is empty or too long for the context, a value cannot be carried out, or the number
                of parameters does not match the number of prompts. No request has started then.
            PipelineError: The pipeline broke.
        """
        groups = [self._front.make(*one) for one in asked.pair(prompts, params)]
        requests = [request for group in groups for request in group]
        try:
            for group in groups:
                self._perform(self._front.submit(group))
            while any(request.output is None for request in requests):
                self._pump()
        finally:
            self._abandon(requests)
        return [
            RequestOutput.joined([request.output for request in group if request.output is not None])
            for group in groups
        ]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamEvent]:
        """Returns the events of one prompt as tokens commit. The last event of a completion carries its output.
        Closing the iterator cancels the request.

        Raises: RequestError: The request cannot be carried out. PipelineError (iterating): The pipeline broke.
        """
        return self._stream(self._front.make(*asked.one(prompt, params)))

    def timings(self, *, reset: bool = False) -> dict[str, float | None]:
        """Returns medians over recent rounds in ms: ``round_ms``, ``hit_round_ms``, ``forward_ms``, ``draft_ms``.

        Args:
            reset: Start a new window afterwards.

        Raises: PipelineError: The pipeline broke.
        """
        self._timings = None
        self._running().lanes[VERIFIER].send(GetTimings(reset=reset))
        while (timings := self._timings) is None:
            self._pump()
        return {
            "round_ms": timings.round_ms,
            "hit_round_ms": timings.hit_round_ms,
            "forward_ms": timings.forward_ms,
            "draft_ms": timings.draft_ms,
        }

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[RoundReport]]:
        """Collects a report of every round in the block. The list is complete when the block ends."""
        rounds = self._rounds = []
        verifier = self._running().lanes[VERIFIER]
        verifier.send(Watch(on=True))
        try:
            yield rounds
            verifier.send(Watch(on=False))
            self.timings()  # its answer comes after every report sent before
        finally:
            self._rounds = None

    def info(self) -> dict[str, Any]:
        """Returns what the workers reported about themselves, by role."""
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
            self._events.update((request.number, events) for request in requests)
            self._perform(self._front.submit(requests))
            while any(request.output is None for request in requests):
                self._pump()
                while events:
                    yield events.popleft()
        finally:
            for request in requests:
                self._events.pop(request.number, None)
            self._abandon(requests)

    def _abandon(self, requests: Sequence[Request]) -> None:
        """Cancels the requests that still run."""
        step = self._front.cancel(requests)
        if step.send and self._pipeline is not None and VERIFIER not in self._pipeline.check():
            with contextlib.suppress(PipelineError):
                self._perform(step)

    def _pump(self) -> None:
        """Takes in what the workers sent. Waits up to ``POLL_S`` for the verifier's first message."""
        pipeline = self._running()
        seen = False
        for role, lane in pipeline.lanes.items():
            wait_s = POLL_S if role == VERIFIER else 0
            while (message := lane.receive(wait_s)) is not None:
                seen, wait_s = True, 0
                self._take(role, message)
        if not seen or time.monotonic() - self._checked_s > POLL_S:
            gone, self._checked_s = pipeline.check(), time.monotonic()
            error = self._front.fatal(gone)
            if error is not None:
                raise error
            self._restart(pipeline, gone)

    def _take(self, role: str, message: Message) -> None:
        if isinstance(message, Timings):
            self._timings = message
        elif isinstance(message, RoundReport):
            if self._rounds is not None:
                self._rounds.append(message)
        else:
            self._perform(self._front.take(role, message))

    def _restart(self, pipeline: Pipeline, gone: Sequence[str]) -> None:
        """Starts a lost draft again, if it is time."""
        step = self._front.restart_due(gone)
        if step is not None and isinstance(pipeline, Restartable):
            try:
                for role in self.config.draft_roles:
                    pipeline.restart(role)
            except (PipelineError, OSError) as error:
                self._front.restart_failed(error)
            else:
                self._perform(step)

    def _perform(self, step: Step) -> None:
        for request, event in step.events:
            if request.number in self._events:
                self._events[request.number].append(event)
        for role, message in step.send:
            self._running().lanes[role].send(message)
