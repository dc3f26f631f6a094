"""Errors in the shape OpenAI's clients read: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

from typing import Any

from ...errors import OverloadedError, PipelineError, RequestError


class APIError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status. param: the request field at fault. code: for programs to tell it by.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": "1"} if self.status in (429, 503) else {}


def as_api_error(error: Exception) -> APIError:
    """What a client is told of an error of the engine's; the inside of anything else stays inside."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, RequestError):
        code = "context_length_exceeded" if "max_model_len" in str(error) else None
        return APIError(400, str(error), code=code)
    if isinstance(error, OverloadedError):
        return APIError(429, str(error), code="rate_limit_exceeded", kind="rate_limit_error")
    if isinstance(error, PipelineError):
        return APIError(503, " ".join(str(error).split()), code="engine_unavailable")
    return APIError(500, f"internal error ({type(error).__name__})")
