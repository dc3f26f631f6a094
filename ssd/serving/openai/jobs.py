"""From the bytes of a request body to a checked job: prompts, choices and what the answer holds."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from ...config.sections import Config
from ...engine.async_engine import AsyncEngine
from ...engine.book import Limits
from ...request.sampling_params import SamplingParams
from ..http import strict_json
from ..http.errors import APIError, shown
from ..parsers.parser import MakeParser, Plain
from .answers import Chat, Schema, Text
from .bodies import (
    COMPLETION_MAX_TOKENS,
    MAX_CHOICES,
    ChatBody,
    CompletionBody,
    read_body,
    sampling_params,
    seeds,
    structured_by,
)
from .chat import ChatTemplate


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One HTTP request, checked."""

    schema: Schema
    model: str
    prompts: list[list[int]]
    choices: list[tuple[int, SamplingParams]]
    """Index into ``prompts``, and parameters."""
    stream: bool
    usage: bool
    """Whether a stream ends with a usage chunk."""
    provenance: bool
    """Whether tokens are reported with their provenance."""
    priority: int = 0
    structured_by: str = "structured_outputs"
    """The field that asked for structured output, if one did."""
    parser: MakeParser = Plain.make
    """Makes the parser of each choice's text."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def head(self) -> dict[str, Any]:
        """Fields that every answer and every chunk has."""
        return {
            "id": f"{self.schema.id_prefix}-{self.id}",
            "object": self.schema.chunk_kind if self.stream else self.schema.kind,
            "created": self.created,
            "model": self.model,
        }


class JobReader:
    """Reads request bodies for one engine. Safe to call from any thread.

    Args:
        model: the name by which requests ask for the model.
        limits: what the engine takes at once; a request that never fits is refused. No limit by default.

    Raises:
        ConfigError: the chat template cannot be read.
    """

    def __init__(self, engine: AsyncEngine, *, model: str, limits: Limits | None = None):
        self._engine, self._model, self._limits = engine, model, limits or Limits()
        self._context = engine.config.engine.max_model_len
        self._template = ChatTemplate(engine.tokenizer, engine.config.server.chat_template)

    def read_completion(self, raw: bytes) -> Job:
        """Reads the bytes of a /v1/completions body. Raises: APIError."""
        return self.completion(strict_json.parse(raw))

    def read_chat(self, raw: bytes) -> Job:
        """Reads the bytes of a /v1/chat/completions body. Raises: APIError."""
        return self.chat(strict_json.parse(raw))

    def completion(self, given: Any) -> Job:
        """Reads a parsed /v1/completions body. Raises: APIError."""
        body: Any = self._body(CompletionBody, given)
        prompt = body.prompt
        listed = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
        if not listed:
            raise APIError(400, "prompt must not be an empty list", param="prompt")
        self._check_count(len(listed), body)
        prompts = [self._engine.tokenize(one) if isinstance(one, str) else one for one in listed]
        return self._job(Text(), body, prompts, body.max_tokens, COMPLETION_MAX_TOKENS)

    def chat(self, given: Any) -> Job:
        """Reads a parsed /v1/chat/completions body. Raises: APIError."""
        body: Any = self._body(ChatBody, given)
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise APIError(400, "give max_tokens or max_completion_tokens, not both", param="max_completion_tokens")
        self._check_count(1, body)
        prompt = self._template.tokens([message.plain() for message in body.messages])
        return self._job(Chat(), body, [prompt], body.max_completion_tokens or body.max_tokens, self._context)

    def _body(self, kind: type[Any], given: Any) -> Any:
        body = read_body(kind, given)
        if body.model != self._model:
            raise APIError(
                404,
                f"the model '{shown(body.model)}' does not exist; this server has {self._model!r}",
                param="model",
                code="model_not_found",
            )
        return body

    def _check_count(self, prompts: int, body: Any) -> None:
        """Raises: APIError: more choices than a request may have, or than ever find a place."""
        count = prompts * (body.n or 1)
        if count > MAX_CHOICES:
            raise APIError(400, f"prompts × n must be at most {MAX_CHOICES}", param="n")
        if self._limits.queue is not None and self._limits.sent is not None:
            places = self._limits.queue + self._limits.sent
            if count > places:
                raise APIError(
                    400, f"{count} choices never fit: this server holds {places} (server.max_queue)", param="n"
                )

    def _job(self, schema: Schema, body: Any, prompts: list[list[int]], asked: int | None, default: int) -> Job:
        """Args: asked: the length asked for, in tokens. default: the length otherwise, where there is room."""
        n = body.n or 1
        if asked is None:
            limits = [max(1, min(default, self._context - len(prompt), self._share(prompts, n))) for prompt in prompts]
        else:
            limits = [asked] * len(prompts)
            for prompt in prompts:
                self._check_context(schema, len(prompt), asked)
        self._check_budget(prompts, limits, n)
        choices = [
            (index, sampling_params(body, max_tokens=limit, seed=seed))
            for index, limit in enumerate(limits)
            for seed in seeds(body, n)
        ]
        return Job(
            schema=schema,
            model=self._model,
            prompts=prompts,
            choices=choices,
            stream=bool(body.stream),
            usage=bool(body.stream_options and body.stream_options.include_usage),
            provenance=bool(body.provenance),
            priority=body.priority or 0,
            structured_by=structured_by(body),
        )

    def _check_context(self, schema: Schema, length: int, asked: int) -> None:
        """Raises: APIError: prompt and answer are longer than the context."""
        if length and length + asked > self._context:
            raise APIError(
                400,
                f"this model's context is {self._context} tokens (engine.max_model_len); the prompt has {length} and "
                f"{asked} were asked for",
                param=schema.prompt_field,
                code="context_length_exceeded",
            )

    def _share(self, prompts: list[list[int]], n: int) -> int:
        """Tokens of the limit on tokens in flight that are left for each choice's answer."""
        if self._limits.tokens is None:
            return self._context
        return (self._limits.tokens - n * sum(map(len, prompts))) // (n * len(prompts))

    def _check_budget(self, prompts: list[list[int]], limits: list[int], n: int) -> None:
        """Raises: APIError: the request is over the limit on tokens in flight even on an idle server."""
        costs = (min(len(prompt) + limit, self._context) for prompt, limit in zip(prompts, limits, strict=True))
        cost = n * sum(costs)
        if self._limits.tokens is not None and cost > self._limits.tokens:
            raise APIError(
                400,
                f"this request may need {cost} tokens and never fits: this server holds {self._limits.tokens} "
                "(server.max_tokens_in_flight); lower max_tokens, n or the number of prompts",
                param="max_tokens",
                code="invalid_value",
            )


def model_name(config: Config) -> str:
    """The name by which requests ask for the model: the configured one, or the last part of the target's path."""
    return config.server.model_name or config.target.model.rstrip("/").rpartition("/")[2]
