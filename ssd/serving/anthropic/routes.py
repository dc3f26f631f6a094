"""Routes of the Messages API."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from ...engine.async_engine import AsyncEngine
from ...errors import SSDError
from ..http.bodies import read_body, renamed
from ..http.errors import APIError, as_api_error
from ..http.sse import typed_sse
from ..openai.generation import Generation
from ..openai.jobs import Job, JobReader
from ..openai.routes import CLIENT_GONE, EventStream, body_of, check_ready, started, unless_gone
from ..parsers.parts import Reasoning
from .bodies import CountBody, MessagesBody
from .errors import REQUEST_ID, AnthropicErrors, request_id
from .translation import NAMES, chat_body
from .writer import Event, MessageWriter

MESSAGES = "/v1/messages"
COUNT = f"{MESSAGES}/count_tokens"


def add_messages(app: FastAPI, engine: AsyncEngine, jobs: JobReader) -> None:
    def read(raw: bytes) -> tuple[MessagesBody, Job]:
        body = read_body(MessagesBody, raw)
        try:
            return body, jobs.chat(chat_body(body, MESSAGES))
        except APIError as error:
            raise renamed(error, NAMES) from None

    def count(raw: bytes) -> int:
        body = read_body(CountBody, raw)
        try:
            return len(jobs.chat_prompt(chat_body(body, COUNT)))
        except APIError as error:
            raise renamed(error, NAMES) from None

    @app.post(MESSAGES)
    async def messages(request: Request) -> Response:
        check_ready(engine)
        if (raw := await body_of(request)) is None:
            return Response(status_code=CLIENT_GONE)
        body, job = await asyncio.to_thread(read, raw)
        try:
            generation = await started(request, engine, job)
        except APIError as error:
            raise renamed(error, NAMES) from None
        writer = MessageWriter(
            name=f"msg_{job.id}",
            model=job.model,
            input_tokens=len(job.prompts[0]),
            stop_sequences=body.stop_sequences or (),
        )
        if job.stream:
            response: Response = EventStream(generation, _events(generation, writer))
        else:
            response = await unless_gone(request, generation, _whole(generation, writer))
        response.headers[REQUEST_ID] = request_id()
        return response

    @app.post(COUNT)
    async def count_tokens(request: Request) -> Response:
        check_ready(engine)
        if (raw := await body_of(request)) is None:
            return Response(status_code=CLIENT_GONE)
        return JSONResponse({"input_tokens": await asyncio.to_thread(count, raw)}, headers={REQUEST_ID: request_id()})


async def _whole(generation: Generation, writer: MessageWriter) -> dict[str, Any]:
    """Returns the message. Raises: PipelineError, APIError."""
    try:
        async with contextlib.aclosing(_written(generation, writer)) as written:
            async for _ in written:
                pass
    except APIError as error:
        raise renamed(error, NAMES) from None
    return writer.message


async def _events(generation: Generation, writer: MessageWriter) -> AsyncIterator[bytes]:
    """Yields server-sent events. An error after the beginning is the last event."""
    try:
        yield _encoded(writer.begin())
        async with contextlib.aclosing(_written(generation, writer)) as written:
            async for events in written:
                yield _encoded(events)
    except (SSDError, APIError) as error:
        yield AnthropicErrors().event(renamed(as_api_error(error), NAMES))


async def _written(generation: Generation, writer: MessageWriter) -> AsyncGenerator[list[Event], None]:
    """Writes the message while its parts come. Yields the events of each step."""
    thoughts: list[str] = []
    async with contextlib.aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            thoughts += [part.text for part in delta.parts if isinstance(part, Reasoning)]
            events = [event for part in delta.parts for event in writer.add(part)]
            output, reason = delta.event.output, delta.finish_reason
            if output is not None and reason is not None:
                metrics = generation.totals([output])["metrics"]
                thought = await generation.tokens_of("".join(thoughts))
                events += writer.end(output, reason, thinking_tokens=thought, more={"metrics": metrics})
            if events:
                yield events


def _encoded(events: Iterable[Event]) -> bytes:
    return b"".join(map(typed_sse, events))
