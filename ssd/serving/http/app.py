"""The HTTP application: OpenAI's endpoints, health, metrics, the playground page."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from ... import __version__
from ...engine.async_engine import AsyncEngine
from ...errors import SSDError
from ..metrics import Metrics
from .chat import ChatTemplate
from .errors import APIError, as_api_error
from .generation import Generation, Job, chat_job, completion_job, sse
from .guard import App, Guard

PAGE = Path(__file__).with_name("playground.html")
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
KEEP_ALIVE_S = 10.0


class EventStream(StreamingResponse):
    """Server-sent events of a generation, which is given up whenever the response ends, also one
    that never began."""

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
    """The application over an engine, which may still be starting.

    Raises:
        ConfigError: API keys or the chat template are wrong.
    """
    config = engine.config
    template = ChatTemplate(engine.tokenizer, config.server.chat_template)
    app = FastAPI(title="ssd", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    began = int(time.time())
    metrics.gauges(
        num_requests_running=lambda: engine.running,
        num_requests_waiting=lambda: engine.queued,
        tokens_in_flight=lambda: engine.tokens_in_flight,
        draft_lost=lambda: float(engine.degraded is not None),
    )

    async def run(request: Request, make: Callable[[Any], Job]) -> Response:
        if not engine.ready:
            raise APIError(503, str(engine.failure or "the models are still loading"), code="engine_unavailable")
        job = make(await _json(request))
        generation = Generation(engine, job, request.scope.get("ssd.client", ""))
        if job.stream:
            return EventStream(generation)
        return await _unless_gone(request, generation)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await run(request, lambda raw: completion_job(raw, engine, model))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await run(request, lambda raw: chat_job(raw, engine, model, template))

    def described() -> dict[str, Any]:
        length = config.engine.max_model_len
        return {"id": model, "object": "model", "created": began, "owned_by": "ssd", "max_model_len": length}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != model:
            raise APIError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
        return described()

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
                *(["sd", "ssd"] if config.draft is not None else []),
            ],
            "running": engine.running,
            "queued": engine.queued,
        }

    @app.get("/ssd/rounds")
    async def rounds() -> Response:
        if not engine.ready:
            raise APIError(503, "the models are still loading", code="engine_unavailable")

        async def reports() -> AsyncIterator[bytes]:
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

        return StreamingResponse(reports(), media_type="text/event-stream", headers={"cache-control": "no-cache"})

    @app.get("/")
    async def page() -> Response:
        headers = {"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"}
        return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)

    async def refused(_request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = APIError(error.status_code, str(error.detail))
        told = as_api_error(error)
        metrics.refused.labels(told.status).inc()
        return JSONResponse(told.body, status_code=told.status, headers=told.headers)

    for kind in (APIError, SSDError, HTTPException):
        app.add_exception_handler(kind, refused)
    if config.server.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.server.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return Guard(app, config.server)


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise APIError(400, "the body is not valid JSON") from None


async def _unless_gone(request: Request, generation: Generation) -> Response:
    """The whole answer, given up if the client goes away before."""
    answer = asyncio.ensure_future(generation.whole())
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return JSONResponse(answer.result())
        return Response(status_code=499)  # nobody reads it
    finally:
        for task in (answer, gone):
            task.cancel()
        generation.cancel()


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
