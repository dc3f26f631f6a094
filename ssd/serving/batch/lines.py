"""Lines of a batch file: JSON objects of two kinds.

* OpenAI's batch format: ``custom_id``, ``method`` ``POST``, ``url`` and ``body``;
* plain: ``prompt`` (text or token ids), optionally ``id``, ``max_tokens`` and any sampling parameter.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import PipelineError, UsageError
from ...request.sampling_params import MAX_SEED
from ..http import strict_json
from ..http.errors import APIError, as_api_error, shown

PLAIN_MAX_TOKENS = 256
URLS = ("/v1/completions", "/v1/chat/completions")
MAX_LINE_BYTES = 2**24
OPENAI_KEYS = frozenset({"custom_id", "method", "url", "body"})
OPENAI_ONLY = ("stream", "model", "n", "provenance")
"""Parameters that plain lines must not have."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of the input."""

    number: int
    """From 1."""
    id: str
    openai: bool
    """Whether the line has OpenAI's batch format."""
    url: str = URLS[0]
    body: dict[str, Any] | None = None
    error: str | None = None
    """Why the line cannot work."""


@contextmanager
def line_border(number: int, failed: Callable[[APIError], None]) -> Iterator[None]:
    """Turns any error within the block into an error of the line. Unexpected ones are logged with their traceback.

    Args:
        number: of the line.
        failed: called with the error.

    Raises:
        PipelineError: the pipeline broke, which is not the line's fault.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        told = as_api_error(error)
        if told.status == 503:
            raise PipelineError(told.message) from error
        if told.code == "internal_error":
            log.exception("line %d failed", number)
        failed(told)


def read_lines(source: Path, model: str) -> Iterator[Line]:
    """Yields every line that is not blank. A bad line has an error.

    Args:
        model: name of the model, for plain lines.

    Raises:
        UsageError: the file cannot be read.
    """
    seen: set[str] = set()
    try:
        with source.open("rb") as file:
            for number, raw in _raw_lines(file):
                if raw is not None and not raw.strip():
                    continue
                line = _read_line(number, raw, model)
                if line.error is None and line.id in seen:
                    error = f"the id '{shown(line.id)}' is in use"
                    line = Line(number=number, id=line.id, openai=line.openai, error=error)
                seen.add(line.id)
                yield line
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}") from None


def _raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yields numbers and bytes; None for a line longer than ``MAX_LINE_BYTES``, which is skipped piece by piece."""
    for number in itertools.count(1):
        raw = file.readline(MAX_LINE_BYTES + 1)
        if not raw:
            return
        yield number, raw if len(raw) <= MAX_LINE_BYTES else None
        while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            raw = file.readline(MAX_LINE_BYTES + 1)


def _read_line(number: int, raw: bytes | None, model: str) -> Line:
    id, openai = f"line-{number}", False
    failures: list[APIError] = []
    with line_border(number, failures.append):
        given = _object(raw)
        openai = bool(given.keys() & (OPENAI_KEYS - {"method"}))
        id = _openai_id(given) if openai else _plain_id(given, id)
        strict_json.check(given)
        url, body = _openai_body(given) if openai else (URLS[0], _plain_body(given, model))
        return Line(number=number, id=id, openai=openai, url=url, body=_seeded(body, id))
    return Line(number=number, id=id, openai=openai, error=failures[0].message)


def _object(raw: bytes | None) -> dict[str, Any]:
    if raw is None:
        raise APIError(400, f"the line is longer than {MAX_LINE_BYTES} bytes")
    given = strict_json.parse(raw, "the line")
    if not isinstance(given, dict):
        raise APIError(400, "the line is not a JSON object")
    return given


def _openai_id(given: dict[str, Any]) -> str:
    id = given.get("custom_id")
    if not isinstance(id, str) or not id:
        raise APIError(400, "custom_id must be a non-empty text")
    strict_json.check({"custom_id": id})
    return id


def _plain_id(given: dict[str, Any], default: str) -> str:
    id = given.get("id", default)
    if not isinstance(id, str | int) or isinstance(id, bool) or id == "":
        raise APIError(400, "id must be a text or an integer")
    strict_json.check({"id": id})
    return str(id)


def _openai_body(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    url, body = given.get("url"), given.get("body")
    if given.get("method") != "POST":
        raise APIError(400, "method must be POST")
    if url not in URLS:
        raise APIError(400, f"url must be one of {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise APIError(400, "body must be a JSON object")
    if body.get("stream"):
        raise APIError(400, "stream is not allowed in a batch")
    if unknown := given.keys() - OPENAI_KEYS:
        raise APIError(400, f"unknown key '{shown(min(unknown))}'")
    return url, body


def _plain_body(given: dict[str, Any], model: str) -> dict[str, Any]:
    if "prompt" not in given:
        raise APIError(400, "prompt is missing")
    for name in OPENAI_ONLY:
        if name in given:
            raise APIError(400, f"{name} is not for plain lines; use the OpenAI batch format")
    fields = {name: value for name, value in given.items() if name != "id"}
    return {"temperature": 0.0, "max_tokens": PLAIN_MAX_TOKENS, **fields, "model": model}


def _seeded(body: dict[str, Any], id: str) -> dict[str, Any]:
    """Returns the body with a seed: the given one, or one derived from the id, so that a resumed run gives the
    results of an uninterrupted one."""
    if body.get("seed") is not None:
        return body
    digest = hashlib.blake2b(id.encode(), digest_size=8).digest()
    return {**body, "seed": int.from_bytes(digest, "little") & MAX_SEED}
