"""From the bytes of a request body to a checked job: prompts, choices and what the answer holds."""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...config.load import resolve_model_path
from ...config.sections import Config
from ...engine.async_engine import AsyncEngine
from ...engine.book import Limits
from ...models.checkpoints.generation_config import sampling_defaults
from ...request.sampling_params import SamplingParams
from ..http import strict_json
from ..http.errors import APIError, shown
from ..parsers.formats import AnswerFormat
from ..parsers.parser import CallIds, MakeParser, Plain
from .answers import Chat, Schema, Text
from .bodies import (
    MAX_CHOICES,
    ChatBody,
    CompletionBody,
    read_body,
    sampling_params,
    seeds,
    structured_by,
)
from .chat import ChatTemplate, Rendering
from .fields import UnknownFields
from .logprobs import TokenDetails
from .tools import Shape, ToolUse, shape

CUT_HEADER = "x-ssd-max-tokens"
"""The length that was granted, in tokens, where it is less than was asked for."""
PROMPT_END = 64
"""Tokens at the end of a prompt that tell whether the answer begins inside of reasoning."""

log = logging.getLogger(__name__)


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
    running_usage: bool = False
    """Whether every chunk of a stream has the usage so far."""
    provenance: bool
    """Whether tokens are reported with their provenance."""
    priority: int = 0
    structured_by: str = "structured_outputs"
    """The field that asked for structured output, if one did."""
    details: TokenDetails = field(default_factory=TokenDetails)
    """What the answer says about tokens beside its text."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """HTTP headers of the answer: what about the request was ignored or changed."""
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

    def call_ids(self, choice: int) -> CallIds:
        """Returns what makes the ids of a choice's tool calls: a function of the job, the choice and the call."""
        return lambda call: hashlib.sha256(f"{self.id}/{choice}/{call}".encode()).hexdigest()


class JobReader:
    """Reads request bodies for one engine. Safe to call from any thread.

    Args:
        model: the name by which requests ask for the model.
        limits: what the engine takes at once; a request that never fits is refused. No limit by default.

    Raises:
        ConfigError: the chat template cannot be read, or its variables are wrong.
    """

    def __init__(self, engine: AsyncEngine, *, model: str, limits: Limits | None = None):
        self._engine, self._model, self._limits = engine, model, limits or Limits()
        self._context = engine.config.engine.max_model_len
        self._cutting = engine.config.server.long_requests == "cut"
        self._template = ChatTemplate(engine.tokenizer, engine.config.server)
        self._unknown = UnknownFields(engine.config.server.unknown_parameters)
        self._defaults = server_defaults(engine.config)
        self._format = AnswerFormat.of(
            engine.tokenizer,
            self._template.source,
            calls=engine.config.server.tool_parser,
            reasoning=engine.config.server.reasoning_parser,
        )
        log.info("tool calls are read as %s, reasoning as %s", self._format.calls, self._format.reasoning)

    def read_completion(self, raw: bytes) -> Job:
        """Reads the bytes of a /v1/completions body. Raises: APIError."""
        return self.completion(strict_json.parse(raw))

    def read_chat(self, raw: bytes) -> Job:
        """Reads the bytes of a /v1/chat/completions body. Raises: APIError."""
        return self.chat(strict_json.parse(raw))

    def completion(self, given: Any) -> Job:
        """Reads a parsed /v1/completions body. Raises: APIError."""
        self._check_items(given.get("prompt") if isinstance(given, dict) else None)
        body, headers = self._body(CompletionBody, given)
        prompt = body.prompt
        listed = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
        if not listed:
            raise APIError(400, "prompt must not be an empty list", param="prompt")
        self._check_count(len(listed), body)
        special = body.add_special_tokens is not False
        prompts = [
            self._engine.tokenize(one, add_special_tokens=special) if isinstance(one, str) else one for one in listed
        ]
        texts = [one if isinstance(one, str) else self._decode(one) for one in listed] if body.echo else []
        return self._job(Text(), body, prompts, headers, echoed=texts)

    def chat(self, given: Any) -> Job:
        """Reads a parsed /v1/chat/completions body. Raises: APIError."""
        body, headers = self._body(ChatBody, given)
        self._check_count(1, body)
        use, prompt = self._chat_prompt(body)
        end = self._engine.tokenizer.decode(prompt[-PROMPT_END:], skip_special_tokens=False)
        answer = shape(
            use,
            self._format,
            end,
            structured=body.structured_outputs,
            response_format=body.response_format,
            show_specials=body.skip_special_tokens is False,
        )
        return self._job(Chat(), body, [prompt], headers, answer)

    def _check_items(self, prompt: Any) -> None:
        """Refuses a list that is too long whatever is in it. Validating its items would keep other requests waiting.

        Raises: APIError.
        """
        if isinstance(prompt, list) and len(prompt) > max(MAX_CHOICES, self._context):
            raise APIError(
                400,
                f"the prompt has {len(prompt)} items; this server takes at most {MAX_CHOICES} prompts, or the "
                f"{self._context - 1} tokens that leave room in its context (engine.max_model_len)",
                param="prompt",
                code="context_length_exceeded",
            )

    def chat_prompt(self, given: Any) -> list[int]:
        """Reads a parsed /v1/chat/completions body. Returns the token ids of its prompt, however many they are.

        Raises:
            APIError: 400.
        """
        body, _ = self._body(ChatBody, given)
        return self._chat_prompt(body)[1]

    def _chat_prompt(self, body: Any) -> tuple[ToolUse, list[int]]:
        use = ToolUse.of(body.tools, body.tool_choice, body.parallel_tool_calls, format=self._format)
        messages = [message.for_template() for message in body.messages]
        return use, self._template.tokens(messages, tools=use.shown, rendering=rendering(body))

    def check_model(self, name: str | None) -> None:
        """Raises: APIError: 404: there is no model of that name."""
        if name and name != self._model:
            raise APIError(
                404,
                f"the model '{shown(name)}' does not exist; this server has {self._model!r}",
                param="model",
                code="model_not_found",
            )

    def _body(self, kind: type[Any], given: Any) -> tuple[Any, dict[str, str]]:
        """Returns a checked body, and headers of the answer. Raises: APIError."""
        body, unknown = read_body(kind, given)
        headers = self._unknown.take(unknown, kind.model_fields)
        self.check_model(body.model)
        return body, headers

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

    def _job(
        self,
        schema: Schema,
        body: Any,
        prompts: list[list[int]],
        headers: Mapping[str, str],
        answer: Shape | None = None,
        echoed: Sequence[str] = (),
    ) -> Job:
        n = body.n or 1
        limits = [self._limit(schema, body, prompts, index) for index in range(len(prompts))]
        if body.length is not None and min(limits) < body.length:
            headers = {**headers, CUT_HEADER: str(min(limits))}
        self._check_budget(body, prompts, limits)
        choices = [
            (index, sampling_params(body, max_tokens=limit, seed=seed, defaults=self._defaults, shape=answer))
            for index, limit in enumerate(limits)
            for seed in seeds(body, n)
        ]
        options = body.stream_options
        return Job(
            schema=schema,
            model=self._model,
            prompts=prompts,
            choices=choices,
            stream=bool(body.stream),
            usage=bool(options and options.include_usage),
            running_usage=bool(options and options.continuous_usage_stats),
            provenance=bool(body.provenance),
            priority=body.priority or 0,
            structured_by=structured_by(body) if answer is None else answer.structured_by,
            parser=Plain.make if answer is None else answer.parser,
            headers=headers,
            details=TokenDetails(
                echoed=tuple(echoed),
                prompt_logprobs=body.prompt_logprobs is not None,
                token_ids=bool(body.return_token_ids),
                called_by_id=bool(body.return_tokens_as_token_ids),
            ),
        )

    def _decode(self, tokens: list[int]) -> str:
        """Returns the text of a prompt given as token ids."""
        return self._engine.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _limit(self, schema: Schema, body: Any, prompts: list[list[int]], index: int) -> int:
        """Returns how many tokens the answer to a prompt may have: as many as asked for, or else the endpoint's
        default, at most as many as there is room for.

        Raises: APIError: the prompt is empty or leaves no room, or more were asked for than there is room for.
        """
        length, where = len(prompts[index]), f"prompt {index}" if len(prompts) > 1 else "the prompt"
        if not length:
            raise APIError(
                400, f"{where} is empty; give at least one token", param=schema.prompt_field, code="invalid_value"
            )
        room, least = self._context - length, 0 if body.length == 0 else 1
        if room < least:
            raise APIError(
                400,
                f"{where} has {length} tokens; this model's context of {self._context} (engine.max_model_len) takes "
                f"prompts of at most {self._context - least}",
                param=schema.prompt_field,
                code="context_length_exceeded",
            )
        if body.length is None:
            return max(1, min(body.default_length or room, room, self._share(prompts, body.n or 1)))
        if body.length > room and not self._cutting:
            raise APIError(
                400,
                f"{body.length_field} is {body.length}, and there is room for {room}: {where} has {length} tokens and "
                f"this model's context is {self._context} (engine.max_model_len)",
                param=body.length_field,
                code="context_length_exceeded",
            )
        return min(body.length, room)

    def _share(self, prompts: list[list[int]], n: int) -> int:
        """Tokens of the limit on tokens in flight that are left for each choice's answer."""
        if self._limits.tokens is None:
            return self._context
        return (self._limits.tokens - n * sum(map(len, prompts))) // (n * len(prompts))

    def _check_budget(self, body: Any, prompts: list[list[int]], limits: list[int]) -> None:
        """Raises: APIError: the request is over the limit on tokens in flight even on an idle server."""
        costs = (min(len(prompt) + limit, self._context) for prompt, limit in zip(prompts, limits, strict=True))
        cost = (body.n or 1) * sum(costs)
        if self._limits.tokens is not None and cost > self._limits.tokens:
            raise APIError(
                400,
                f"this request may need {cost} tokens and never fits: this server holds {self._limits.tokens} "
                f"(server.max_tokens_in_flight); lower {body.length_field}, n or the number of prompts",
                param=body.length_field,
                code="invalid_value",
            )


def model_name(config: Config) -> str:
    """The name by which requests ask for the model: the configured one, or the last part of the target's path."""
    return config.server.model_name or config.target.model.rstrip("/").rpartition("/")[2]


def server_defaults(config: Config) -> dict[str, Any]:
    """Returns the sampling parameters of requests that leave them out, and logs them if the model sets any."""
    if config.server.generation_config == "none":
        return {}
    defaults = sampling_defaults(resolve_model_path(config.target.model))
    if defaults:
        log.warning(
            "the model's generation_config.json sets defaults of requests: %s (server.generation_config=none takes "
            "OpenAI's)",
            ", ".join(f"{name}={value}" for name, value in defaults.items()),
        )
    return defaults


def rendering(body: Any) -> Rendering:
    """Returns what a chat body says about the template. As in vLLM, ``reasoning_effort`` also sets
    ``enable_thinking``, unless the request does."""
    variables: dict[str, Any] = {}
    if body.reasoning_effort is not None:
        variables = {"enable_thinking": body.reasoning_effort != "none", "reasoning_effort": body.reasoning_effort}
    ends_open = bool(body.continue_final_message)
    return Rendering(
        template=body.chat_template,
        variables={**variables, **(body.chat_template_kwargs or {})},
        documents=body.documents,
        add_generation_prompt=not ends_open if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=ends_open,
        add_special_tokens=bool(body.add_special_tokens),
    )
