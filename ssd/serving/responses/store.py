"""Responses that clients may refer to later, in bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from ..http.errors import APIError, shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A response that ended, and its conversation. Both as JSON, so that what they take is known."""

    response: bytes
    input: bytes
    """Array of the items the response answers, from the beginning of the conversation."""
    output: bytes
    """Array of the response's own items."""

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.response) + len(self.input) + len(self.output)


class ResponseStore:
    """Keeps responses by client and id. No client reads another's. Safe to call from any thread.

    The least recently used are dropped when room is needed.

    Args:
        limit: bytes of all responses; 0 keeps none.
    """

    def __init__(self, limit: int):
        self._limit, self._lock = limit, threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Stored] = OrderedDict()
        self.size = 0
        """Bytes of what is kept."""

    def put(self, client: str, name: str, stored: Stored) -> None:
        """Keeps a response. One that is larger than the whole store is not kept."""
        if stored.size > self._limit:
            return
        with self._lock:
            while self.size + stored.size > self._limit:
                _, dropped = self._kept.popitem(last=False)
                self.size -= dropped.size
            self._kept[client, name] = stored
            self.size += stored.size

    def get(self, client: str, name: str, *, param: str | None = None) -> Stored:
        """Returns a response of the client.

        Args:
            param: the request field that names the response.

        Raises:
            APIError: 404: it is not kept (any more).
        """
        with self._lock:
            stored = self._kept.get((client, name))
            if stored is not None:
                self._kept.move_to_end((client, name))
                return stored
        raise APIError(
            404,
            f"there is no response '{shown(name)}'; this server keeps responses in memory "
            f"(server.responses_bytes={self._limit}) and drops the least recently used",
            param=param,
            code="not_found" if param is None else "previous_response_not_found",
        )

    def drop(self, client: str, name: str) -> None:
        """Drops a response. Raises: APIError: 404: it is not kept."""
        self.get(client, name)
        with self._lock:
            dropped = self._kept.pop((client, name), None)
            self.size -= dropped.size if dropped is not None else 0
