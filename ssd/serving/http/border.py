"""The outer border of the HTTP application: no exception leaves it, clients get an error of their protocol."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .errors import APIError, ErrorFormat, as_api_error

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger(__name__)


class Border:
    """Answers for an application that raises.

    Before the response began the error is the response; within a stream of events it is the last event, and
    the stream ends cleanly. Unexpected errors are logged with their traceback.

    Args:
        app: the application.
        count: called with the status of every error answered here.
        format_of: the format of the errors of a path.
    """

    def __init__(self, app: App, count: Callable[[int], None], format_of: Callable[[str], ErrorFormat]):
        self._app, self._count, self._format_of = app, count, format_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            await self._app(scope, receive, answer.send)
        except Exception as error:
            told = as_api_error(error)
            if not isinstance(error, APIError):
                log.exception("%s %s failed", scope["method"], scope["path"])
            if answer.over:
                return
            self._count(told.status)
            if not answer.began:
                await self._format_of(scope["path"]).response(told)(scope, receive, send)
            else:
                await answer.finish(self._format_of(scope["path"]).event(told))


class _Answer:
    """What has been sent of one response."""

    def __init__(self, send: Send):
        self._send = send
        self.began, self.over, self._events = False, False, False

    async def send(self, message: Message) -> None:
        await self._send(message)
        if message["type"] == "http.response.start":
            self.began = True
            self._events = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
        elif message["type"] == "http.response.body":
            self.over = not message.get("more_body", False)

    async def finish(self, event: bytes) -> None:
        """Ends a response that began. One that is not events stays cut short: the server closes it."""
        if self._events:
            await self._send({"type": "http.response.body", "body": event})
