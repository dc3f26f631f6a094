"""Errors in the shape OpenAI's clients read: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import json
from typing import Any, Protocol

from starlette.responses import Response

from ...errors import OverloadedError, PipelineError, RequestError

MAX_MESSAGE = 600
"""Characters of a message; longer ones are cut."""
MAX_NAME = 64
"""Characters of a client's own text that a message or ``param`` repeats."""


class APIError(Exception):
    """An error answer. Its message is one line of at most ``MAX_MESSAGE`` characters.

    Args:
        status: HTTP status.
        message: what is wrong and what to do; line breaks become spaces.
        param: the request field at fault.
        code: for programs to tell errors apart.
        kind: OpenAI's ``type``; derived from the status by default.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str | None = None
    ):
        message = " ".join(message.split())
        self.message = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"
        super().__init__(self.message)
        self.status, self.code = status, code
        self.param = None if param is None else shown(param)
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": "1"} if self.status in (429, 503) else {}

    @property
    def response(self) -> Response:
        # ASCII output, so that any text can be encoded.
        return Response(json.dumps(self.body), self.status, self.headers, media_type="application/json")


class ErrorFormat(Protocol):
    """How a front door writes its errors."""

    def response(self, error: APIError) -> Response:
        """Returns the response to a request that failed."""
        ...

    def event(self, error: APIError) -> bytes:
        """Returns the event that ends a stream of server-sent events."""
        ...


class OpenAIErrors:
    """``{"error": {message, type, param, code}}``."""

    def response(self, error: APIError) -> Response:
        return error.response

    def event(self, error: APIError) -> bytes:
        return b"data: " + json.dumps(error.body).encode() + b"\n\n"


def as_api_error(error: Exception) -> APIError:
    """Translates an exception for a client. Of unexpected ones it gives only the type: details stay in the log."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, RequestError):
        code = "context_length_exceeded" if "max_model_len" in str(error) else None
        return APIError(400, str(error), code=code)
    if isinstance(error, OverloadedError):
        return APIError(429, str(error), code="rate_limit_exceeded", kind="rate_limit_error")
    if isinstance(error, PipelineError):  # a worker's traceback may follow the first line
        return APIError(503, str(error).partition("\n")[0], code="engine_unavailable")
    return APIError(500, f"internal error ({type(error).__name__})", code="internal_error")


def shown(text: str) -> str:
    """A client's own text, short and printable: for messages that repeat it."""
    return repr(text[:MAX_NAME])[1:-1]
