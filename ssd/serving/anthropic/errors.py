"""Errors in the shape Anthropic's clients read."""

from __future__ import annotations

import json
import uuid
from typing import Any

from starlette.responses import Response

from ..http.errors import APIError
from ..http.sse import typed_sse

REQUEST_ID = "request-id"
"""The header with the id of a request."""
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""``error.type`` by HTTP status. Other statuses below 500 are invalid requests, the rest ``api_error``."""


class AnthropicErrors:
    """``{"type": "error", "error": {type, message}, "request_id"}``."""

    def response(self, error: APIError) -> Response:
        request = request_id()
        headers = {**error.headers, REQUEST_ID: request}
        return Response(json.dumps(error_body(error, request)), error.status, headers, media_type="application/json")

    def event(self, error: APIError) -> bytes:
        return typed_sse(error_body(error, request_id()))


def error_body(error: APIError, request: str) -> dict[str, Any]:
    """Args: request: id of the request."""
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request}


def request_id() -> str:
    return f"req_{uuid.uuid4().hex}"
