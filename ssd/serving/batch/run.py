"""``ssd batch``: a file of requests, to a file of results.

Two kinds of lines, as JSON objects:

* OpenAI's batch format: ``custom_id``, ``method`` ``POST``, ``url`` and ``body``;
* plain: ``prompt`` (text or token ids), optionally ``id``, ``max_tokens`` and any sampling parameter.

A line that cannot work goes to the error file with its number and is not fatal. A request without a
seed gets one from its id, so that a run that is taken up again gives what it would have given.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...config.load import resolve_model_path
from ...config.sections import Config
from ...engine.async_engine import AHEAD, AsyncEngine
from ...engine.book import Limits
from ...errors import PipelineError, RequestError, SSDError, UsageError
from ...pipeline.runtime.launch import Pipeline, launch_here
from ...pipeline.runtime.plan import Plan
from ...request.sampling_params import MAX_SEED
from ..http.chat import ChatTemplate
from ..http.errors import APIError, as_api_error
from ..http.generation import Generation, chat_job, completion_job
from .journal import Journal, fingerprint

PLAIN_MAX_TOKENS = 256
URLS = ("/v1/completions", "/v1/chat/completions")
FLUSH_S = 0.5
"""How much work a kill may cost at most, beside what is being decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of the input."""

    number: int
    """From 1."""
    id: str
    openai: bool
    url: str = URLS[0]
    body: dict[str, Any] | None = None
    error: str | None = None
    """Why it cannot work."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """Of a run. Counts."""

    total: int
    done: int = 0
    failed: int = 0
    resumed: int = 0
    """Done in an earlier run."""
    tokens: int = 0
    """Generated in this run."""


def read_lines(source: Path, model: str) -> Iterator[Line]:
    """Every line that is not blank, good or bad. Raises: UsageError: the file cannot be read."""
    seen: set[str] = set()
    try:
        with source.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                line = _read_line(number, raw, model)
                if line.error is None and line.id in seen:
                    line = Line(number=number, id=line.id, openai=line.openai, error=f"the id {line.id!r} is in use")
                seen.add(line.id)
                yield line
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}") from None


def _read_line(number: int, raw: bytes, model: str) -> Line:
    def bad(why: str, id: str = "", openai: bool = False) -> Line:
        return Line(number=number, id=id or f"line-{number}", openai=openai, error=why)

    try:
        given = json.loads(raw)
    except (ValueError, RecursionError):
        return bad("not valid JSON")
    if not isinstance(given, dict):
        return bad("not a JSON object")
    if "custom_id" in given or "body" in given or "url" in given:
        id = given.get("custom_id")
        if not isinstance(id, str) or not id:
            return bad("custom_id must be a non-empty text", openai=True)
        if given.get("method") != "POST":
            return bad("method must be POST", id, True)
        if given.get("url") not in URLS:
            return bad(f"url must be one of {', '.join(URLS)}", id, True)
        body = given.get("body")
        if not isinstance(body, dict):
            return bad("body must be a JSON object", id, True)
        if body.get("stream"):
            return bad("stream is not allowed in a batch", id, True)
        if unknown := given.keys() - {"custom_id", "method", "url", "body"}:
            return bad(f"unknown key {sorted(unknown)[0]!r}", id, True)
        return Line(number=number, id=id, openai=True, url=given["url"], body=_seeded(body, id))
    id = given.pop("id", f"line-{number}")
    if not isinstance(id, str | int) or isinstance(id, bool) or id == "":
        return bad("id must be a text or an integer")
    if "prompt" not in given:
        return bad("prompt is missing", str(id))
    for name in ("stream", "model", "n", "provenance"):
        if name in given:
            return bad(f"{name} is not for plain lines; use the OpenAI batch format", str(id))
    body = {"temperature": 0.0, "max_tokens": PLAIN_MAX_TOKENS, **given, "model": model}
    return Line(number=number, id=str(id), openai=False, body=_seeded(body, str(id)))


def _seeded(body: dict[str, Any], id: str) -> dict[str, Any]:
    if body.get("seed") is not None:
        return body
    digest = hashlib.blake2b(id.encode(), digest_size=8).digest()
    return {**body, "seed": int.from_bytes(digest, "little") & MAX_SEED}


class LineWorker:
    """Makes results of lines with an engine."""

    def __init__(self, engine: AsyncEngine, model: str):
        self._engine, self._model = engine, model
        self._template = ChatTemplate(engine.tokenizer, engine.config.server.chat_template)

    async def record(self, line: Line) -> dict[str, Any]:
        """What the journal keeps of a line, and the number of its ``tokens``.

        Raises: PipelineError: the pipeline broke.
        """
        try:
            if line.error is not None:
                raise APIError(400, line.error)
            if line.url == URLS[0]:
                job = completion_job(line.body, self._engine, self._model)
            else:
                job = chat_job(line.body, self._engine, self._model, self._template)
            answer = await Generation(self._engine, job, "").whole()
        except (APIError, RequestError) as error:
            if isinstance(error, APIError) and error.status == 503:
                raise PipelineError(str(error)) from error
            told = as_api_error(error)
            return {"line": line.number, "ok": False, "result": _failure(line, told), "tokens": 0}
        tokens = answer["usage"]["completion_tokens"]
        return {"line": line.number, "ok": True, "result": _success(line, answer), "tokens": tokens}


class Batch:
    """Runs a file through an engine.

    Args:
        source, out: JSON lines. restart: begin anew even if there are results.

    Raises:
        UsageError: the files or the configuration.
    """

    def __init__(
        self,
        config: Config,
        source: Path,
        out: Path,
        *,
        restart: bool = False,
        launch: Callable[[Plan], Pipeline] = launch_here,
    ):
        self._config, self._source = config, source
        self._model = model_name(config)
        self._launch = launch
        total = sum(1 for _ in read_lines(source, self._model))
        if not total:
            raise UsageError(f"{source} has no lines")
        if not out.parent.is_dir():
            raise UsageError(f"{out}: the folder {str(out.parent)!r} does not exist; create it first")
        self.journal = Journal(out, fingerprint(source, _settings(config)), restart=restart)
        resumed = len(self.journal.done)
        failed = sum(not ok for ok in self.journal.done.values())
        self.progress = Progress(total=total, done=resumed, failed=failed, resumed=resumed)

    async def run(self, report: Callable[[Progress], None] = lambda _progress: None) -> Progress:
        """Do what is left to do, and write the output.

        Raises: PipelineError: the pipeline broke; what is done is kept, and the run can be taken up.
        """
        try:
            if self.progress.done < self.progress.total:
                await self._decode(report)
            self.journal.finish()
            return self.progress
        finally:
            self.journal.close()

    async def _decode(self, report: Callable[[Progress], None]) -> None:
        slots = self._config.engine.max_batch
        limits = Limits(sent=slots + AHEAD)
        engine = AsyncEngine(self._config, launch=self._launch, limits=limits)
        worker = LineWorker(engine, self._model)
        fresh: list[dict[str, Any]] = []
        async with engine:
            room = asyncio.Semaphore(2 * slots + AHEAD)

            async def one(line: Line) -> None:
                try:
                    record = await worker.record(line)
                finally:
                    room.release()
                fresh.append(record)
                self._count(record)

            async def keep() -> None:
                while True:
                    await asyncio.sleep(FLUSH_S)
                    await self._flush(fresh)
                    report(self.progress)

            async with asyncio.TaskGroup() as group:
                keeper = group.create_task(keep())
                try:
                    async with asyncio.TaskGroup() as work:
                        for line in self._left():
                            await room.acquire()
                            work.create_task(one(line))
                finally:
                    keeper.cancel()
            await self._flush(fresh)
            report(self.progress)

    async def _flush(self, fresh: list[dict[str, Any]]) -> None:
        records = fresh[:]
        del fresh[: len(records)]
        if records:
            await asyncio.to_thread(self.journal.add, records)

    def _left(self) -> Iterator[Line]:
        """Lines without a result."""
        return (line for line in read_lines(self._source, self._model) if line.number not in self.journal.done)

    def _count(self, record: dict[str, Any]) -> None:
        self.progress.done += 1
        self.progress.failed += not record["ok"]
        self.progress.tokens += record.pop("tokens")


def model_name(config: Config) -> str:
    """What requests call the model."""
    return config.server.model_name or config.target.model.rstrip("/").rpartition("/")[2]


def _settings(config: Config) -> dict[str, Any]:
    """What the results depend on, beside the input. How fast they come is none of it."""
    folder = resolve_model_path(config.target.model)
    weights = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.safetensors"))
    ]
    return {
        "version": __version__,
        "target": str(folder.resolve()),
        "weights": weights,
        "dtype": config.target.dtype,
        "device": config.target.device,
        "numerics": config.numerics,
        # Under the other rules what is sampled depends on what was drafted.
        "rule": None if config.speculation.verify == "coupled" else config.model_dump(include={"speculation", "draft"}),
        "max_model_len": config.engine.max_model_len,
        "model_name": config.server.model_name,
        "chat_template": config.server.chat_template,
    }


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


def first_cause(error: BaseException) -> BaseException:
    """What broke a run, out of the groups it comes in."""
    while isinstance(error, BaseExceptionGroup):
        ours: Sequence[BaseException] = [e for e in error.exceptions if isinstance(e, SSDError | BaseExceptionGroup)]
        error = (ours or error.exceptions)[0]
    return error
