"""Decodes the lines of a batch file into the records that the journal keeps."""

from __future__ import annotations

import uuid
from typing import Any

from ...engine.async_engine import AsyncEngine
from ..http.errors import APIError
from ..openai.generation import Generation
from ..openai.jobs import JobReader
from .lines import CHAT, Line, line_border

PLAIN_MAX_TOKENS = 256
"""Length of a plain line's completion, in tokens, if the line names none and the context has room."""


class LineWorker:
    """Decodes lines with an engine.

    Args:
        model: the name by which lines ask for the model.
    """

    def __init__(self, engine: AsyncEngine, model: str):
        self._engine, self._jobs = engine, JobReader(engine, model=model)

    async def record(self, line: Line) -> dict[str, Any]:
        """Returns the journal's record of a line (``line``, ``ok``, ``result``) and the number of ``tokens``.

        A line that fails gives a record that is not ``ok``.

        Raises:
            PipelineError: the pipeline broke.
        """
        if line.error is not None:
            return _failed(line, _not_a_request(line, line.error))
        failures: list[APIError] = []
        with line_border(line.number, failures.append):
            body = line.body if line.openai or line.url == CHAT else self._with_length(line.body or {})
            read = self._jobs.chat if line.url == CHAT else self._jobs.completion
            generation = await Generation.start(self._engine, read(body), client="")
            answer = await generation.whole()
            tokens = answer["usage"]["completion_tokens"]
            return {"line": line.number, "ok": True, "result": _success(line, answer), "tokens": tokens}
        return _failed(line, _refused(line, failures[0]))

    def _with_length(self, body: dict[str, Any]) -> dict[str, Any]:
        """Returns a plain completion's body with ``max_tokens``."""
        if body.get("max_tokens") is not None:
            return body
        prompt = body["prompt"]
        ids = self._engine.tokenize(prompt) if isinstance(prompt, str) else prompt
        length = len(ids) if isinstance(ids, list) else 0
        room = self._engine.config.engine.max_model_len - length
        return {**body, "max_tokens": max(1, min(PLAIN_MAX_TOKENS, room))}


ABOUT_TOKENS = ("logprobs", "prompt_logprobs", "token_ids", "prompt_token_ids")
"""What a request may ask about tokens."""


def _success(line: Line, answer: dict[str, Any]) -> dict[str, Any]:
    if line.openai:
        return _openai_result(line, 200, answer)
    [choice] = answer["choices"]
    message, told = choice.get("message"), {**answer, **choice}
    return {
        "id": line.id,
        "text": choice["text"] if message is None else message["content"],
        **({"message": message} if message is not None else {}),
        "finish_reason": choice["finish_reason"],
        **{name: told[name] for name in ABOUT_TOKENS if told.get(name) is not None},
        "usage": answer["usage"],
        "metrics": answer["metrics"],
    }


def _failed(line: Line, result: dict[str, Any]) -> dict[str, Any]:
    return {"line": line.number, "ok": False, "result": result, "tokens": 0}


def _refused(line: Line, error: APIError) -> dict[str, Any]:
    """A request that got an error for an answer."""
    if line.openai:
        return _openai_result(line, error.status, error.body)
    return _plain_error(line, error.body["error"])


def _not_a_request(line: Line, error: dict[str, Any]) -> dict[str, Any]:
    """A line that was never carried out, with the error OpenAI reports for a line of an input file."""
    if not line.openai:
        return _plain_error(line, error)
    told = {"code": error["code"], "message": error["message"], "param": error["param"], "line": line.number}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.id, "response": None, "error": told}


def _plain_error(line: Line, error: dict[str, Any]) -> dict[str, Any]:
    return {"line": line.number, "id": line.id, "error": error}


def _openai_result(line: Line, status: int, body: dict[str, Any]) -> dict[str, Any]:
    number = uuid.uuid4().hex
    response = {"status_code": status, "request_id": f"req_{number}", "body": body}
    return {"id": f"batch_req_{number}", "custom_id": line.id, "response": response, "error": None}
