"""From a line of a batch file to the record that the journal keeps."""

from __future__ import annotations

import uuid
from typing import Any

from ...engine.async_engine import AsyncEngine
from ..http.errors import APIError
from ..openai.generation import Generation
from ..openai.jobs import JobReader
from .lines import URLS, Line, line_border


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
        failures: list[APIError] = []
        with line_border(line.number, failures.append):
            if line.error is not None:
                raise APIError(400, line.error)
            read = self._jobs.completion if line.url == URLS[0] else self._jobs.chat
            generation = await Generation.start(self._engine, read(line.body), client="")
            answer = await generation.whole()
            tokens = answer["usage"]["completion_tokens"]
            return {"line": line.number, "ok": True, "result": _success(line, answer), "tokens": tokens}
        return {"line": line.number, "ok": False, "result": _failure(line, failures[0]), "tokens": 0}


def _success(line: Line, answer: dict[str, Any]) -> dict[str, Any]:
    if line.openai:
        response = {"status_code": 200, "request_id": answer["id"], "body": answer}
        return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.id, "response": response, "error": None}
    [choice] = answer["choices"]
    return {
        "id": line.id,
        "text": choice["text"],
        "finish_reason": choice["finish_reason"],
        **({"logprobs": choice["logprobs"]} if choice["logprobs"] else {}),
        "usage": answer["usage"],
        "metrics": answer["metrics"],
    }


def _failure(line: Line, error: APIError) -> dict[str, Any]:
    if line.openai:
        response = {"status_code": error.status, "request_id": "", "body": error.body}
        return {"line": line.number, "custom_id": line.id, "response": response, "error": error.body["error"]}
    return {"line": line.number, "id": line.id, "error": error.body["error"]}
