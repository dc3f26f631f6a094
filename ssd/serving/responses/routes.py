"""Routes of the Responses API."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from ...engine.async_engine import AsyncEngine
from ...errors import SSDError
from ..http.bodies import read_fields, renamed
from ..http.errors import APIError, as_api_error, shown
from ..http.sse import typed_sse
from ..openai.generation import Delta, Generation
from ..openai.routes import CLIENT_GONE, EventStream, body_of, check_ready, started, unless_gone
from ..parsers.parts import Reasoning, Text
from .pages import Page, page_of
from .reader import Asked, ResponsesReader
from .translation import DOOR, NAMES
from .writer import Event, ResponseWriter

ONE = f"{DOOR}/{{name}}"


def add_responses(app: FastAPI, engine: AsyncEngine, reader: ResponsesReader) -> None:
    store = reader.store

    @app.post(DOOR)
    async def create(request: Request) -> Response:
        check_ready(engine)
        if (raw := await body_of(request)) is None:
            return Response(status_code=CLIENT_GONE)
        asked = await asyncio.to_thread(reader.read, raw, client_of(request))
        try:
            generation = await started(request, engine, asked.job)
        except APIError as error:
            raise renamed(error, NAMES) from None
        answer = _Answer(reader, asked, generation)
        if asked.job.stream:
            return EventStream(generation, answer.events())
        return await unless_gone(request, generation, answer.whole())

    @app.post(f"{DOOR}/input_tokens")
    async def input_tokens(request: Request) -> Response:
        check_ready(engine)
        if (raw := await body_of(request)) is None:
            return Response(status_code=CLIENT_GONE)
        count = await asyncio.to_thread(reader.count, raw, client_of(request))
        return JSONResponse({"object": "response.input_tokens", "input_tokens": count})

    @app.get(ONE)
    async def one(request: Request, name: str) -> Response:
        if request.query_params.get("stream", "false").lower() not in ("false", "0", ""):
            raise APIError(400, "stream is not supported here; responses are kept once they ended", param="stream")
        return Response(store.get(client_of(request), name).response, media_type="application/json")

    @app.delete(ONE)
    async def delete(request: Request, name: str) -> dict[str, Any]:
        store.drop(client_of(request), name)
        return {"id": name, "object": "response", "deleted": True}

    @app.post(f"{ONE}/cancel")
    async def cancel(request: Request, name: str) -> Response:
        store.get(client_of(request), name)
        raise APIError(400, f"response '{shown(name)}' is over; to cancel one that runs, close its connection")

    @app.get(f"{ONE}/input_items")
    async def items(request: Request, name: str) -> dict[str, Any]:
        stored = store.get(client_of(request), name)
        return page_of(json.loads(stored.input), read_fields(Page, dict(request.query_params)))


def client_of(request: Request) -> str:
    """Returns the name of the client, by which responses are kept apart."""
    return request.scope.get("ssd.client", "")


class _Answer:
    """The answer to one request."""

    def __init__(self, reader: ResponsesReader, asked: Asked, generation: Generation):
        self._reader, self._asked, self._generation = reader, asked, generation
        self._writer = ResponseWriter(asked.head)
        self._logprobs: list[dict[str, Any]] = []
        """Of tokens whose text is still to come."""
        self._thoughts: list[str] = []

    async def whole(self) -> dict[str, Any]:
        """Returns the response. Raises: PipelineError, APIError."""
        try:
            async with contextlib.aclosing(self._written()) as written:
                async for _ in written:
                    pass
        except APIError as error:
            raise renamed(error, NAMES) from None
        return self._writer.response

    async def events(self) -> AsyncIterator[bytes]:
        """Yields server-sent events. After an error the last one says that the response failed."""
        try:
            yield _encoded(self._writer.begin())
            async with contextlib.aclosing(self._written()) as written:
                async for events in written:
                    yield _encoded(events)
        except (SSDError, APIError) as error:
            yield _encoded(self._writer.fail(renamed(as_api_error(error), NAMES)))

    def _add(self, delta: Delta) -> list[Event]:
        """Adds the parts of one event. Returns the events of the response."""
        told = self._generation.logprobs(delta)
        self._logprobs += told["content"] if told is not None else []
        events: list[Event] = []
        for part in delta.parts:
            # A parser may hold text back: its tokens wait for it. Those of markers, reasoning and calls are dropped.
            logprobs, self._logprobs = self._logprobs, []
            self._thoughts += [part.text] if isinstance(part, Reasoning) else []
            events += self._writer.add(part, logprobs if isinstance(part, Text) else ())
        return events

    async def _written(self) -> AsyncGenerator[list[Event], None]:
        """Writes the response while its parts come, and keeps it. Yields the events of each step."""
        async with contextlib.aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                events = self._add(delta)
                output = delta.event.output
                if output is not None:
                    metrics = self._generation.totals([output])["metrics"]
                    thought = await self._generation.tokens_of("".join(self._thoughts))
                    events += self._writer.end(output, reasoning_tokens=thought, more={"metrics": metrics})
                    # Before the client knows that the response ended, and may continue it.
                    self._reader.keep(self._asked, self._writer.response)
                if events:
                    yield events


def _encoded(events: Iterable[Event]) -> bytes:
    return b"".join(map(typed_sse, events))
