"""The HTTP application: all front doors over one engine."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from .. import __version__
from ..config.sections import Config
from ..engine.async_engine import AsyncEngine, server_limits
from ..errors import ConfigError, SSDError
from .anthropic.errors import REQUEST_ID, AnthropicErrors
from .anthropic.routes import MESSAGES, add_messages
from .http.border import App, Border
from .http.errors import APIError, ErrorFormat, OpenAIErrors, as_api_error
from .http.guard import Guard
from .http.state import add_state
from .metrics import Metrics
from .openai.fields import IGNORED_HEADER
from .openai.jobs import CUT_HEADER, JobReader
from .openai.routes import Models, add_generation, add_models
from .responses.reader import ResponsesReader
from .responses.routes import add_responses
from .responses.store import ResponseStore
from .tokens import Tokens, add_tokens

EXPOSED = (CUT_HEADER, IGNORED_HEADER, REQUEST_ID, "x-request-id", "retry-after")
"""Headers of answers that pages of other origins may read. A proxy may add ``x-request-id``."""


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
    jobs = JobReader(engine, model=model, limits=server_limits(config))
    add_generation(app, engine, jobs)
    add_responses(app, engine, ResponsesReader(engine, jobs, ResponseStore(config.server.responses_bytes)))
    add_messages(app, engine, jobs)
    add_models(app, Models(model, config))
    add_tokens(app, Tokens(engine, jobs))
    add_state(app, engine, metrics, model)

    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = APIError(error.status_code, str(error.detail))
        told = as_api_error(error)
        metrics.refused.labels(told.status).inc()
        return format_of(request.url.path).response(told)

    # The handler for Exception keeps the framework from answering in plain text; the border logs the error.
    for kind in (APIError, SSDError, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)
    if config.server.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.server.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    return Border(
        Guard(app, config.server),
        count=lambda status: metrics.refused.labels(status).inc(),
        format_of=format_of,
    )


def format_of(path: str) -> ErrorFormat:
    """Returns the format in which the front door of a path writes errors."""
    return AnthropicErrors() if path == MESSAGES or path.startswith(f"{MESSAGES}/") else OpenAIErrors()


def check_limits(config: Config) -> None:
    """Raises: ConfigError: a request as long as the context would never fit."""
    held, length = config.server.max_tokens_in_flight, config.engine.max_model_len
    if held < length:
        raise ConfigError(
            f"server.max_tokens_in_flight={held} is below engine.max_model_len={length}, so a request of full length "
            "would never fit; raise the former or lower the latter"
        )
