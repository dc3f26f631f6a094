"""The HTTP application: OpenAI's endpoints, health, metrics, the playground page."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ... import __version__
from ...config.sections import Config
from ...engine.async_engine import AsyncEngine, server_limits
from ...errors import ConfigError, PipelineError, SSDError
from ...request.methods import WITH_DRAFT
from ..metrics import Metrics
from .answers import sse
from .border import App, Border
from .errors import APIError, as_api_error, shown
from .generation import Generation
from .guard import Guard
from .jobs import Job, JobReader

PAGE = Path(__file__).with_name("playground.html")
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
KEEP_ALIVE_S = 10.0
INLINE_BYTES = 16 * 1024
"""Largest completion body, in bytes, that is read on the event loop: handing it to a thread would take longer."""
CLIENT_GONE = 499
"""nginx's status for a client that left; nobody reads it."""


class EventStream(StreamingResponse):
    """The server-sent events of a generation. The generation is cancelled when the response ends, also one that
    never began."""

    def __init__(self, generation: Generation):
        super().__init__(
            generation.chunks(),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


def build_app(engine: AsyncEngine, metrics: Metrics, *, model: str) -> App:
    """Builds the application over an engine, which may still be starting.

    Args:
        model: the name by which requests ask for the model.

    Raises:
        ConfigError: API keys, the chat template or a limit are wrong.
    """
    config = engine.config
    check_limits(config)
    metrics.gauges(
        num_requests_running=lambda: engine.running,
        num_requests_waiting=lambda: engine.queued,
        tokens_in_flight=lambda: engine.tokens_in_flight,
        draft_lost=lambda: float(engine.degraded is not None),
    )
    app = FastAPI(title="ssd", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    _add_generation(app, engine, JobReader(engine, model=model, limits=server_limits(config)))
    _add_models(app, Models(model, config))
    _add_state(app, engine, metrics, model)

    async def refuse(_request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = APIError(error.status_code, str(error.detail))
        told = as_api_error(error)
        metrics.refused.labels(told.status).inc()
        return told.response

    # The handler for Exception keeps the framework from answering in plain text; the border logs the error.
    for kind in (APIError, SSDError, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)
    if config.server.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.server.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return Border(Guard(app, config.server), count=lambda status: metrics.refused.labels(status).inc())


def check_limits(config: Config) -> None:
    """Raises: ConfigError: a request as long as the context would never fit."""
    held, length = config.server.max_tokens_in_flight, config.engine.max_model_len
    if held < length:
        raise ConfigError(
            f"server.max_tokens_in_flight={held} is below engine.max_model_len={length}, so a request of full length "
            "would never fit; raise the former or lower the latter"
        )


def _add_generation(app: FastAPI, engine: AsyncEngine, jobs: JobReader) -> None:
    async def run(request: Request, read: Callable[[bytes], Job], *, aside: int) -> Response:
        """Args: aside: bodies of more bytes are read in a thread."""
        if not engine.ready:
            raise as_api_error(PipelineError(str(engine.failure or "the models are still loading")))
        try:
            raw = await request.body()
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        job = await asyncio.to_thread(read, raw) if len(raw) > aside else read(raw)
        generation = await Generation.start(engine, job, request.scope.get("ssd.client", ""))
        return EventStream(generation) if job.stream else await _unless_gone(request, generation)

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
        self._name, self._length = name, config.engine.max_model_len
        self._began = int(time.time())

    def described(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._began,
            "owned_by": "ssd",
            "max_model_len": self._length,
        }

    def named(self, name: str) -> dict[str, Any]:
        """Raises: APIError: 404: there is no model of that name."""
        if name != self._name:
            raise APIError(404, f"the model '{shown(name)}' does not exist", param="model", code="model_not_found")
        return self.described()


def _add_models(app: FastAPI, models: Models) -> None:
    @app.get("/v1/models")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [models.described()]}

    @app.get("/v1/models/{name:path}")
    async def one(name: str) -> dict[str, Any]:
        return models.named(name)


def _add_state(app: FastAPI, engine: AsyncEngine, metrics: Metrics, model: str) -> None:
    config = engine.config

    @app.get("/health")
    async def health() -> Response:
        failure = engine.failure
        return JSONResponse(
            {"status": "failed" if failure else "ok", "degraded": engine.degraded is not None},
            status_code=503 if failure else 200,
        )

    @app.get("/ready")
    async def ready() -> Response:
        return JSONResponse({"ready": engine.ready}, status_code=200 if engine.ready else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/ssd/info")
    async def info() -> dict[str, Any]:
        return {
            "version": __version__,
            "model": model,
            "ready": engine.ready,
            "degraded": engine.degraded,
            "speculation": config.speculation.model_dump(),
            "numerics": config.numerics,
            "engine": config.engine.model_dump(),
            "workers": engine.info(),
            "methods": [
                "none",
                *(["self"] if config.speculation.self_draft is not None else []),
                *(WITH_DRAFT if config.draft is not None else ()),
            ],
            "running": engine.running,
            "queued": engine.queued,
        }

    @app.get("/ssd/rounds")
    async def rounds() -> Response:
        if not engine.ready:
            raise as_api_error(PipelineError(str(engine.failure or "the models are still loading")))
        return StreamingResponse(
            _round_events(engine), media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )

    @app.get("/")
    async def page() -> Response:
        headers = {"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"}
        return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)


async def _round_events(engine: AsyncEngine) -> AsyncIterator[bytes]:
    """Yields an event for each round, and a comment every ``KEEP_ALIVE_S`` without one."""
    stream = engine.rounds()
    coming: asyncio.Future[Any] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(stream, None))
            done, _ = await asyncio.wait({coming}, timeout=KEEP_ALIVE_S)
            if not done:
                yield b": still here\n\n"
                continue
            report, coming = coming.result(), None
            if report is None:
                return
            yield sse(dataclasses.asdict(report))
    finally:
        if coming is not None:
            coming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await coming
        await stream.aclose()


async def _unless_gone(request: Request, generation: Generation) -> Response:
    """Waits for the whole answer; gives it up if the client disconnects."""
    answer = asyncio.ensure_future(generation.whole())
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return JSONResponse(answer.result())
        return Response(status_code=CLIENT_GONE)
    finally:
        for task in (answer, gone):
            task.cancel()
        generation.cancel()


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
