"""A job's requests while they run, and the answer made of them: whole, or streamed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ...engine.async_engine import AsyncEngine
from ...engine.request import Caller
from ...engine.stream import RequestStream
from ...errors import RequestError, SSDError
from ...request.output import RequestOutput, StreamEvent
from ..http.errors import APIError, as_api_error
from ..http.sse import sse
from ..parsers.parts import Answer, Call, Part
from .answers import provenance, usage
from .bodies import refused
from .jobs import Job
from .logprobs import ChoiceTokens
from .request_metrics import Level, request_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What became final of one choice with one event of its request."""

    index: int
    """Which choice."""
    parts: tuple[Part, ...]
    event: StreamEvent
    finish_reason: str | None = None
    """``stop``, ``length`` or ``tool_calls`` with a choice's last event, which has its output."""


class Generation:
    """The requests of a job, one for each choice.

    Args:
        streams: the events of each choice.
    """

    def __init__(self, engine: AsyncEngine, job: Job, streams: Sequence[RequestStream]):
        self.job, self.streams = job, streams
        self._lookahead = engine.config.speculation.depth if engine.config.draft is not None else 0
        self._level: Level = engine.config.server.request_metrics
        self._tokens = [
            ChoiceTokens(engine.texts, stream.request, job.details, prompt)
            for stream, (prompt, _) in zip(streams, job.choices, strict=True)
        ]
        """By choice: behind the tokens that were told."""
        self._tokenize = engine.tokenize
        self._generated = 0
        """Tokens of all choices so far."""

    @classmethod
    async def start(
        cls, engine: AsyncEngine, job: Job, client: str, trace_headers: Mapping[str, str] | None = None
    ) -> Generation:
        """Starts all requests of a job, or none.

        Args:
            trace_headers: as in ``Caller``.

        Raises:
            APIError: the engine refuses a parameter.
            OverloadedError, PipelineError: as ``AsyncEngine.open``.
        """
        caller = Caller(client=client, priority=job.priority, label=job.head["id"], trace_headers=trace_headers or {})
        asked = [(job.prompts[prompt], params) for prompt, params in job.choices]
        try:
            return cls(engine, job, await engine.open_all(asked, caller=caller))
        except RequestError as error:
            raise refused(error, job.structured_by) from None

    def cancel(self) -> None:
        """Gives all requests up. Those that are over are left alone."""
        for stream in self.streams:
            stream.cancel()

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yields the answer as typed parts while it comes. Every front door writes its answer from them.

        The text of an event and the text of its parts may differ: a parser holds text back and drops markers. When the
        iterator ends, all requests that are not over are given up.

        Raises:
            PipelineError: the pipeline broke.
            APIError: a request failed, or the server gave it up.
        """
        parsers = [self.job.parser(self.job.call_ids(index)) for index in range(len(self.streams))]
        called: set[int] = set()
        try:
            async with contextlib.aclosing(merged(self.streams)) as events:
                async for index, event in events:
                    parts = parsers[index].feed(event.text)
                    reason: str | None = None
                    if event.output is not None:
                        reason = checked(event.output, self.job).finish_reason
                        parts += parsers[index].finish(cut=_cut(event.output))
                    if any(isinstance(part, Call) for part in parts):
                        called.add(index)
                    if reason == "stop" and index in called:
                        reason = "tool_calls"
                    yield Delta(index=index, parts=tuple(parts), event=event, finish_reason=reason)
        finally:
            self.cancel()

    async def whole(self) -> dict[str, Any]:
        """Returns the answer as one object. Raises: PipelineError, APIError."""
        everything: list[list[Delta]] = [[] for _ in self.streams]
        async with contextlib.aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                everything[delta.index].append(delta)
        finished = [self._choice(index, deltas) for index, deltas in enumerate(everything)]
        outputs = [output for output, _ in finished]
        about = {} if self.job.schema.prompt_in_choices else self._about_prompt(0)
        return {**self.job.head, "choices": [choice for _, choice in finished], **about, **self.totals(outputs)}

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yields server-sent events. An error after the beginning is the last event."""
        schema, details = self.job.schema, self.job.details
        outputs: dict[int, RequestOutput] = {}
        begun: set[int] = set()
        try:
            if schema.opening is not None:
                for index in range(len(self.streams)):
                    yield self._chunk(index, schema.opening, about=self._tokens[index].prompt_ids())
            async with contextlib.aclosing(self.deltas()) as deltas:
                async for delta in deltas:
                    index, event = delta.index, delta.event
                    self._generated += len(event.token_ids)
                    echoed, logprobs = self._tokens[index].read(schema, event.logprobs)
                    listed = event.token_ids and (self.job.provenance or details.token_ids)
                    if echoed or delta.parts or logprobs or listed:
                        content = _after(echoed, schema.part(delta.parts))
                        content |= self._origins(event) | self._tokens[index].ids(event.token_ids)
                        if schema.prompt_in_choices and index not in begun:
                            content |= self._tokens[index].prompt_ids()
                        begun.add(index)
                        yield self._chunk(index, content, logprobs)
                    if event.output is not None:
                        outputs[index] = event.output
                        closing = {**schema.closing, "stop_reason": event.output.stop_reason}
                        yield self._chunk(index, closing, finish_reason=delta.finish_reason)
            if self.job.usage:
                listed = [outputs[index] for index in range(len(self.streams))]
                yield sse({**self.job.head, "choices": [], **self.totals(listed)})
            yield b"data: [DONE]\n\n"
        except (SSDError, APIError) as error:
            yield sse(as_api_error(error).body)

    def logprobs(self, delta: Delta) -> dict[str, Any] | None:
        """Returns the log-probabilities of an event's tokens, if the job asks for them. Takes events in order, each
        once."""
        _, logprobs = self._tokens[delta.index].read(self.job.schema, delta.event.logprobs)
        return logprobs

    async def tokens_of(self, text: str) -> int:
        """Returns how many tokens a part of the answer has when it is tokenized again."""
        return len(await asyncio.to_thread(self._tokenize, text, add_special_tokens=False)) if text else 0

    def totals(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """Returns ``usage`` and ``metrics`` of the whole answer.

        Args:
            outputs: of all choices, in order.
        """
        owners = [prompt for prompt, _ in self.job.choices]
        return {"usage": usage(self.job.prompts, owners, outputs), "metrics": self._metrics(outputs)}

    def _choice(self, index: int, deltas: Sequence[Delta]) -> tuple[RequestOutput, dict[str, Any]]:
        """Returns the output of one choice, and its part of the answer."""
        output = deltas[-1].event.output
        assert output is not None, "the last event of a request has its output"
        echoed, logprobs = self._tokens[index].read(self.job.schema, output.logprobs)
        choice = {
            "index": index,
            **_after(echoed, self.job.schema.whole(Answer.of(part for delta in deltas for part in delta.parts))),
            "logprobs": logprobs,
            "finish_reason": deltas[-1].finish_reason,
            "stop_reason": output.stop_reason,
            **self._tokens[index].ids(output.token_ids),
            **(self._about_prompt(index) if self.job.schema.prompt_in_choices else {}),
        }
        if self.job.provenance:
            choice["provenance"] = [token for delta in deltas for token in provenance(delta.event)]
        return output, choice

    def _origins(self, event: StreamEvent) -> dict[str, Any]:
        return {"provenance": provenance(event), "drafted": event.drafted} if self.job.provenance else {}

    def _about_prompt(self, index: int) -> dict[str, Any]:
        """Returns what is asked about a choice's prompt."""
        tokens = self._tokens[index]
        return {**tokens.prompt_scores(), **tokens.prompt_ids()}

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        *,
        finish_reason: str | None = None,
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> bytes:
        """Args: about: fields beside the choices."""
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self.job.usage else {}
        if self.job.running_usage:
            prompt = sum(map(len, self.job.prompts))
            counts = {"prompt_tokens": prompt, "completion_tokens": self._generated}
            usage = {"usage": {**counts, "total_tokens": prompt + self._generated}}
        return sse({**self.job.head, "choices": [choice], **about, **usage})

    def _metrics(self, outputs: list[RequestOutput]) -> dict[str, Any] | None:
        """``metrics`` of the whole answer: of requests with one choice."""
        if len(outputs) != 1:
            return {"speculative_decoding": None}
        [output], [stream] = outputs, self.streams
        return request_metrics(stream.request, output, lookahead=self._lookahead, level=self._level)


def _cut(output: RequestOutput) -> bool:
    """Whether the limit or the request's own stop strings and tokens ended an answer, not the model."""
    return output.finish_reason == "length" or output.stop_reason is not None


def _after(echoed: str, content: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of a text completion's choice with the prompt before it."""
    return {**content, "text": echoed + content["text"]} if echoed else content


async def merged(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, StreamEvent], None]:
    """Yields the events of all streams as they come, with the stream's index.

    Raises: what a stream raises, at once.
    """
    events: asyncio.Queue[tuple[int, StreamEvent | None]] = asyncio.Queue()

    async def forward(index: int, stream: RequestStream) -> None:
        try:
            async for event in stream:
                events.put_nowait((index, event))
        finally:
            events.put_nowait((index, None))

    tasks = [asyncio.create_task(forward(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            index, event = await events.get()
            if event is None:
                await tasks[index]  # raises what ended the stream, if anything did
                left -= 1
            else:
                yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def checked(output: RequestOutput, job: Job) -> RequestOutput:
    """Returns an output that ended well.

    Raises: APIError: 503 if the server gave the request up; otherwise what the verifier says: 400 if it names a
        parameter of the request, 500 if not.
    """
    if output.finish_reason == "cancelled":
        raise APIError(503, "the server is shutting down", code="engine_unavailable")
    if output.finish_reason == "error":
        told = refused(RequestError(output.error or "the request failed"), job.structured_by)
        named = told.param is not None
        raise APIError(400 if named else 500, told.message, param=told.param, code="generation_failed")
    return output
