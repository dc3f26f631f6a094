"""Lines of a batch file: JSON objects in one of two formats.

* OpenAI's batch format: ``custom_id``, ``method`` ``POST``, ``url`` and ``body``;
* plain: ``prompt`` (text or token ids) or ``messages``, optionally ``id``, ``max_tokens`` and any sampling parameter.
"""

from __future__ import annotations

import codecs
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

COMPLETIONS, CHAT = URLS = ("/v1/completions", "/v1/chat/completions")
MAX_LINE_BYTES = 2**24
OPENAI_KEYS = ("custom_id", "method", "url", "body")
OPENAI_ONLY = ("stream", "model", "n", "provenance")
"""Parameters that plain lines must not have."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of the input. All values are JSON, so that lines can be sent to other machines."""

    number: int
    """From 1."""
    id: str | None
    """``custom_id`` in OpenAI's format; None if the line has none."""
    openai: bool
    """Whether the results of the line have OpenAI's format."""
    url: str = COMPLETIONS
    body: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    """Why the line is not a request: ``message``, ``type``, ``param``, ``code``."""


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
    """Yields every line that is not blank. A line that is not a request has an error.

    A line that cannot be read has the format of the line before it; at the beginning of the file, that of the first
    line that can be read.

    Args:
        model: name of the model, for plain lines.

    Raises:
        UsageError: the file cannot be read.
    """
    seen: set[str | None] = set()
    try:
        with source.open("rb") as file:
            openai = next((_is_openai(given) for given in map(_readable, _raw_lines(file)) if given is not None), False)
            file.seek(0)
            for number, raw in enumerate(_raw_lines(file), 1):
                if raw is not None and not raw.strip():
                    continue
                line = _read_line(number, raw, model, openai)
                if line.error is None and line.id in seen:
                    error = _duplicate(line)
                    line = Line(number=number, id=line.id, openai=line.openai, error=error.body["error"])
                seen.add(line.id)
                openai = line.openai
                yield line
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}") from None


def _raw_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yields the bytes of each line, without a byte order mark; None for a line longer than ``MAX_LINE_BYTES``, which
    is skipped piece by piece."""
    for number in itertools.count():
        raw = file.readline(MAX_LINE_BYTES + 1)
        if not raw:
            return
        yield (raw if number else raw.removeprefix(codecs.BOM_UTF8)) if len(raw) <= MAX_LINE_BYTES else None
        while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            raw = file.readline(MAX_LINE_BYTES + 1)


def _readable(raw: bytes | None) -> dict[str, Any] | None:
    """Returns a line's object, or None if it has none."""
    try:
        return _object(raw)
    except APIError:
        return None


def _is_openai(given: dict[str, Any]) -> bool:
    return bool(given.keys() & {"custom_id", "url", "body"})


def _read_line(number: int, raw: bytes | None, model: str, openai: bool) -> Line:
    """Args: openai: the format if the line does not tell."""
    id: str | None = None
    failures: list[APIError] = []
    with line_border(number, failures.append):
        given = _object(raw)
        openai = _is_openai(given)
        id = _openai_id(given) if openai else _plain_id(given, f"line-{number}")
        strict_json.check(given)
        url, body = _openai_body(given) if openai else _plain_body(given, model)
        return Line(number=number, id=id, openai=openai, url=url, body=_seeded(body, id))
    if id is None and not openai:
        id = f"line-{number}"
    return Line(number=number, id=id, openai=openai, error=failures[0].body["error"])


def _object(raw: bytes | None) -> dict[str, Any]:
    if raw is None:
        raise APIError(400, f"the line is longer than {MAX_LINE_BYTES} bytes", code="line_too_long")
    try:
        given = strict_json.parse(raw, "the line")
    except APIError as error:
        raise APIError(400, error.message, code="invalid_json_line") from None
    if not isinstance(given, dict):
        raise APIError(400, "the line is not a JSON object", code="invalid_json_line")
    return given


def _duplicate(line: Line) -> APIError:
    name = "custom_id" if line.openai else "id"
    return APIError(400, f"the {name} '{shown(line.id or '')}' is in use", param=name, code="duplicate_custom_id")


def _openai_id(given: dict[str, Any]) -> str:
    if "custom_id" not in given:
        raise _missing("custom_id")
    id = given["custom_id"]
    if not isinstance(id, str) or not id:
        raise APIError(400, "custom_id must be a non-empty text", param="custom_id", code="invalid_custom_id")
    strict_json.check({"custom_id": id})
    return id


def _plain_id(given: dict[str, Any], default: str) -> str:
    id = given.get("id", default)
    if not isinstance(id, str | int) or isinstance(id, bool) or id == "":
        raise APIError(400, "id must be a text or an integer", param="id")
    strict_json.check({"id": id})
    return str(id)


def _openai_body(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    for name in OPENAI_KEYS:
        if name not in given:
            raise _missing(name)
    url, body = given["url"], given["body"]
    if given["method"] != "POST":
        raise APIError(400, "method must be POST", param="method", code="invalid_method")
    if url not in URLS:
        named = f"{shown(url)} cannot be used in a batch; " if isinstance(url, str) else ""
        raise APIError(400, f"{named}url must be one of {', '.join(URLS)}", param="url", code="invalid_url")
    if not isinstance(body, dict):
        raise APIError(400, "body must be a JSON object", param="body", code="invalid_type")
    if body.get("stream"):
        raise APIError(400, "stream is not allowed in a batch", param="body.stream", code="invalid_value")
    return url, body


def _plain_body(given: dict[str, Any], model: str) -> tuple[str, dict[str, Any]]:
    chat = "messages" in given
    if not chat and "prompt" not in given:
        raise APIError(400, "prompt or messages is missing", param="prompt", code="missing_required_parameter")
    if chat and "prompt" in given:
        raise APIError(400, "give prompt or messages, not both", param="messages", code="invalid_value")
    prompt = given.get("prompt")
    if isinstance(prompt, list) and len(prompt) != 1 and any(isinstance(part, str | list) for part in prompt):
        raise APIError(400, "prompt must be one text or its token ids; write a line for each prompt", param="prompt")
    for name in OPENAI_ONLY:
        if name in given:
            raise APIError(400, f"{name} is not for plain lines; use the OpenAI batch format", param=name)
    fields = {name: value for name, value in given.items() if name != "id"}
    return CHAT if chat else COMPLETIONS, {"temperature": 0.0, **fields, "model": model}


def _missing(name: str) -> APIError:
    return APIError(400, f"{name} is missing", param=name, code="missing_required_parameter")


def _seeded(body: dict[str, Any], id: str) -> dict[str, Any]:
    """Returns the body with a seed: the given one, or one derived from the id, so that a resumed run gives the
    results of an uninterrupted one."""
    if body.get("seed") is not None:
        return body
    digest = hashlib.blake2b(id.encode(), digest_size=8).digest()
    return {**body, "seed": int.from_bytes(digest, "little") & MAX_SEED}
