"""Routes about the server's state: health, metrics, information, running rounds, the playground page."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ... import __version__
from ...engine.async_engine import AsyncEngine
from ...errors import PipelineError
from ...request.methods import WITH_DRAFT
from ..metrics import Metrics
from .errors import as_api_error
from .sse import sse

PAGE = Path(__file__).with_name("playground.html")
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
KEEP_ALIVE_S = 10.0


def metrics_app(metrics: Metrics, model: str) -> FastAPI:
    """Returns an application that serves ``/metrics`` alone, for a port of its own."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_metrics(app, metrics, model)
    return app


def _add_metrics(app: FastAPI, metrics: Metrics, model: str) -> None:
    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(model), media_type="text/plain; version=0.0.4; charset=utf-8")


def add_state(app: FastAPI, engine: AsyncEngine, metrics: Metrics, model: str) -> None:
    """Adds the routes. ``/metrics`` is left out if it has a port of its own."""
    config = engine.config
    if not isinstance(config.server.metrics, int):
        _add_metrics(app, metrics, model)

    @app.get("/health")
    async def health() -> Response:
        failure = engine.failure
        return JSONResponse(
            {"status": "failed" if failure else "ok", "degraded": engine.degraded is not None},
            status_code=503 if failure else 200,
        )

    @app.get("/ping")
    async def ping() -> Response:
        return await health()

    @app.get("/version")
    async def version() -> dict[str, Any]:
        return {"version": __version__}

    @app.get("/load")
    async def load() -> dict[str, Any]:
        return {"server_load": engine.running + engine.queued}

    @app.get("/ready")
    async def ready() -> Response:
        return JSONResponse({"ready": engine.accepting}, status_code=200 if engine.accepting else 503)

    @app.get("/ssd/info")
    async def info() -> dict[str, Any]:
        return {
            "version": __version__,
            "model": model,
            "ready": engine.accepting,
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
