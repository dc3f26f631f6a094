"""Who may call: API keys, Host and Origin checks, limits on bodies. One ASGI wrapper around the app."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from pathlib import Path
from urllib.parse import urlsplit

from ...config.sections import ServerConfig
from ...errors import ConfigError
from .border import App, Message, Receive, Scope, Send
from .errors import APIError, shown

OPEN_PATHS = frozenset({"/", "/health", "/ping", "/ready", "/favicon.ico"})
"""Paths that need no key. They reveal nothing about users' text."""
TRACE_HEADERS = ("traceparent", "tracestate")
"""W3C's headers that name the trace a request belongs to."""
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
MIN_KEY = 16
"""Characters of an API key."""


class Guard:
    """Passes requests on to ``app``, or raises an ``APIError`` for the border to answer. Adds the client's name and
    the trace's headers to the scope (``ssd.client``, ``ssd.trace``).

    A page of another origin cannot use a server on loopback: its ``Origin`` is refused, and so is the ``Host``
    of a rebound name. Bodies must be JSON, which browsers do not send across origins without a preflight.

    Raises:
        ConfigError: no key where one is needed, or a bad key file.
    """

    def __init__(self, app: App, config: ServerConfig):
        self._app, self._config = app, config
        self._keys = read_keys(config)
        self._open = OPEN_PATHS | ({"/metrics"} if config.metrics == "open" else frozenset())
        self._hosts = {name.lower() for name in config.allowed_hosts}
        if is_loopback(config.host):
            self._hosts |= LOOPBACK_NAMES | {config.host.lower()}
        elif self._hosts:
            self._hosts.add(config.host.lower())
        self._origins = {origin.rstrip("/").lower() for origin in config.allowed_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self._check_host(headers)
        self._check_origin(headers)
        scope["ssd.client"] = self._check_key(scope, headers)
        scope["ssd.trace"] = {name: headers[name] for name in TRACE_HEADERS if name in headers}
        self._check_body(scope, headers)
        await self._app(scope, self._bounded(receive), send)

    def _check_host(self, headers: dict[str, str]) -> None:
        host = _hostname(headers.get("host", ""))
        if self._hosts and host not in self._hosts:
            raise APIError(
                421, f"this server's name is not '{shown(host)}'; see server.allowed_hosts", code="wrong_host"
            )

    def _check_origin(self, headers: dict[str, str]) -> None:
        origin = headers.get("origin")
        if origin is None or origin.lower() in self._origins:
            return
        try:
            parts = urlsplit(origin)
            own = parts.scheme in ("http", "https") and parts.netloc.lower() == headers.get("host", "").lower()
        except ValueError:  # brackets that are not an IPv6 address
            own = False
        if not own:
            raise APIError(403, "pages of this origin may not call; see server.allowed_origins", code="wrong_origin")

    def _check_key(self, scope: Scope, headers: dict[str, str]) -> str:
        """Returns the client's name, by which clients take turns."""
        address = scope.get("client") or ("",)
        if not self._keys or scope["path"] in self._open or scope["method"] == "OPTIONS":
            return f"address {address[0]}"
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = [token] if kind.lower() == "bearer" else []
        given += [headers["x-api-key"]] if "x-api-key" in headers else []  # Anthropic's clients
        digests = [_digest(one.strip()) for one in given]
        matches = [name for digest in digests for name, key in self._keys.items() if hmac.compare_digest(digest, key)]
        if not matches:
            told = "this server needs an API key: Authorization: Bearer KEY, or x-api-key: KEY"
            raise APIError(401, told, code="invalid_api_key")
        return matches[0]

    def _check_body(self, scope: Scope, headers: dict[str, str]) -> None:
        if scope["method"] != "POST":
            return
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise APIError(415, "the body must be JSON, with content-type application/json")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._config.max_body_bytes:
            raise self._too_long

    @property
    def _too_long(self) -> APIError:
        return APIError(413, f"the body is longer than server.max_body_bytes={self._config.max_body_bytes}")

    def _bounded(self, receive: Receive) -> Receive:
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > self._config.max_body_bytes:
                    raise self._too_long
            return message

        return bounded


def read_keys(config: ServerConfig) -> dict[str, bytes]:
    """Returns the SHA-256 digest of each key, by a name for the key. Raises: ConfigError."""
    if config.api_key_file is None:
        if not is_loopback(config.host):
            raise ConfigError(
                f"server.host={config.host} is reachable from other machines; set server.api_key_file "
                "(one key a line), or bind 127.0.0.1"
            )
        return {}
    path = Path(config.api_key_file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"server.api_key_file: {path} cannot be read: {error}") from None
    if not lines or min(map(len, lines)) < MIN_KEY:
        raise ConfigError(f"server.api_key_file: {path} needs at least one key, each of {MIN_KEY} characters or more")
    return {f"key {number}": _digest(key) for number, key in enumerate(lines, 1)}


def is_loopback(host: str) -> bool:
    """Whether a host name or address is reachable from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _hostname(header: str) -> str:
    """Returns the name in a Host header, without the port."""
    if header.startswith("["):
        return header[1 : header.find("]")].lower()
    return header.rpartition(":")[0].lower() if ":" in header else header.lower()
