"""Routes of OpenAI's API: completions, chat completions, models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ...config.sections import Config
from ...engine.async_engine import AsyncEngine
from ...errors import PipelineError
from ..http.errors import APIError, as_api_error, shown
from .generation import Generation
from .jobs import Job, JobReader

INLINE_BYTES = 16 * 1024
"""Largest completion body, in bytes, that is read on the event loop: handing it to a thread would take longer."""
CLIENT_GONE = 499
"""nginx's status for a client that left; nobody reads it."""


class EventStream(StreamingResponse):
    """The server-sent events of a generation. The generation is cancelled when the response ends, also one that
    never began."""

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]):
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **generation.job.headers},
        )
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


def add_generation(app: FastAPI, engine: AsyncEngine, jobs: JobReader) -> None:
    async def run(request: Request, read: Callable[[bytes], Job], *, aside: int) -> Response:
        """Args: aside: bodies of more bytes are read in a thread."""
        check_ready(engine)
        if (raw := await body_of(request)) is None:
            return Response(status_code=CLIENT_GONE)
        job = await asyncio.to_thread(read, raw) if len(raw) > aside else read(raw)
        generation = await started(request, engine, job)
        if job.stream:
            return EventStream(generation, generation.chunks())
        return await unless_gone(request, generation, generation.whole())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await run(request, jobs.read_completion, aside=INLINE_BYTES)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        # How long a template takes does not depend on the body's size alone.
        return await run(request, jobs.read_chat, aside=0)


class Models:
    """The one model, as OpenAI's API describes models."""

    def __init__(self, name: str, config: Config):
        self._name, self._root, self._length = name, config.target.model, config.engine.max_model_len
        self._began = int(time.time())

    def described(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._began,
            "owned_by": "ssd",
            "root": self._root,
            "parent": None,
            "max_model_len": self._length,
            "permission": [self._permission],
        }

    @property
    def _permission(self) -> dict[str, Any]:
        """What old clients of OpenAI's API read, as vLLM writes it."""
        return {
            "id": f"modelperm-{self._name}",
            "object": "model_permission",
            "created": self._began,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }

    def named(self, name: str) -> dict[str, Any]:
        """Raises: APIError: 404: there is no model of that name."""
        if name != self._name:
            raise APIError(404, f"the model '{shown(name)}' does not exist", param="model", code="model_not_found")
        return self.described()


def add_models(app: FastAPI, models: Models) -> None:
    @app.get("/v1/models")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [models.described()]}

    @app.get("/v1/models/{name:path}")
    async def one(name: str) -> dict[str, Any]:
        return models.named(name)


def check_ready(engine: AsyncEngine) -> None:
    """Raises: APIError: 503: the models are not loaded, or the pipeline broke."""
    if not engine.ready:
        raise as_api_error(PipelineError(str(engine.failure or "the models are still loading")))


async def body_of(request: Request) -> bytes | None:
    """Returns the body, or None if the client left."""
    try:
        return await request.body()
    except ClientDisconnect:
        return None


async def started(request: Request, engine: AsyncEngine, job: Job) -> Generation:
    """Starts a job for a request. Raises: as ``Generation.start``."""
    client, traced = request.scope.get("ssd.client", ""), request.scope.get("ssd.trace")
    return await Generation.start(engine, job, client, traced)


async def unless_gone(request: Request, generation: Generation, whole: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """Waits for the whole answer of a generation; gives it up if the client disconnects."""
    answer = asyncio.ensure_future(whole)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return JSONResponse(answer.result(), headers=dict(generation.job.headers))
        return Response(status_code=CLIENT_GONE)
    finally:
        for task in (answer, gone):
            task.cancel()
        generation.cancel()


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
