"""Request bodies of the OpenAI API, and how their fields become ``SamplingParams``.

Other servers' fields and unknown ones are in ``fields``.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import BeforeValidator, Field, create_model

from ...errors import RequestError
from ...request.methods import ServedMethod
from ...request.sampling_params import MAX_LOGPROBS, MAX_SEED, SamplingParams, completion_seed
from ..http import strict_json
from ..http.bodies import MAX_ITEMS, SHORT, read_fields
from ..http.errors import APIError, as_api_error
from .fields import sort_fields
from .messages import ChatMessage, Stored, Strict
from .structured import ResponseFormat, StructuredOutputs, structured_outputs
from .tools import MAX_TOOLS, FunctionTool, Shape, ToolChoice

MAX_STOPS = 16
MAX_NAMED = 1024
"""Entries of ``logit_bias`` and ``bad_words``."""
MAX_CHOICES = 128
"""Prompts × n of one request."""
RANDOM_SEED = -1
"""Asks for a random seed, as in vLLM."""
MAX_PRIORITY = 2**31 - 1
MAX_INT64 = 2**63 - 1
MAX_FLOAT32 = 3.4028234e38


def _whole(value: Any) -> Any:
    """Returns 8 for 8.0: JSON has one kind of number, and some clients write all of them with a fraction."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, Field(ge=-MAX_FLOAT32, le=MAX_FLOAT32)]
Integer = Annotated[Whole, Field(ge=-MAX_INT64, le=MAX_INT64)]
Count = Annotated[Whole, Field(ge=1, le=MAX_INT64)]
Length = Annotated[Whole, Field(ge=0, le=MAX_INT64)]
TopCount = Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT64)]
Ids = Annotated[list[TokenId], Field(fail_fast=True)]
"""As many as the body's bytes allow: an id takes no more work than its text. The first wrong one is the error."""
Stop = str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A request field that is a sampling parameter."""

    name: str
    type: Any
    sampling: str = ""
    """Field of ``SamplingParams``; the same name by default."""
    default: Any = None
    """Used when the request leaves the field out or gives null; None leaves it to ``SamplingParams``."""


PARAMETERS = (
    Parameter("temperature", Number, default=1.0),
    Parameter("top_p", Number),
    Parameter("top_k", Annotated[Whole, Field(ge=-1, le=MAX_INT64)]),
    Parameter("min_p", Number),
    Parameter("stop", Stop),
    Parameter("stop_token_ids", Ids),
    Parameter("ignore_eos", bool),
    Parameter("include_stop_str_in_output", bool),
    Parameter("skip_special_tokens", bool),
    Parameter("min_tokens", Integer),
    Parameter("presence_penalty", Number),
    Parameter("frequency_penalty", Number),
    Parameter("repetition_penalty", Number),
    Parameter("logit_bias", Annotated[dict[str, Number], Field(max_length=MAX_NAMED)]),
    Parameter("bad_words", Annotated[list[str | Ids], Field(max_length=MAX_NAMED, fail_fast=True)]),
    Parameter("allowed_token_ids", Ids),
    Parameter("method", ServedMethod),
    Parameter("seed", Annotated[Whole, Field(ge=-(2**63), le=MAX_SEED)]),
)
"""A new sampling parameter is one line here, and must not be in ``UNSUPPORTED``."""


class StreamOptions(Stored):
    include_usage: bool | None = None
    """End with a chunk that has the usage of the whole answer."""
    continuous_usage_stats: bool | None = None
    """As in vLLM: every chunk has the usage so far."""
    include_obfuscation: bool | None = None
    """Without effect: chunks are not padded."""

    @property
    def asking(self) -> bool:
        """Whether any option is on."""
        return any(self.model_dump().values())


class Common(Strict):
    """Fields that both endpoints have, beside ``PARAMETERS``."""

    default_length: ClassVar[int | None] = None
    """Longest answer where the request does not say, in tokens. None: to the end of the context."""
    model: str | None = None
    """May be left out or empty: there is one model."""
    n: Annotated[Whole, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """As in vLLM."""
    max_tokens: Length | None = None
    """0 computes the prompt only."""
    max_completion_tokens: Length | None = None
    prompt_logprobs: TopCount | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    """As in vLLM: report log-probabilities and ids of the prompt's tokens, ids of all tokens, ids in place of texts."""
    provenance: bool | None = None
    """Our extension: report for each token where it came from."""
    priority: Annotated[Whole, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    """As in vLLM: lower values go first. Values other than 0 need ``engine.scheduling=priority``."""

    @property
    def length_field(self) -> str:
        """The field that says how long the answer may be: ``max_completion_tokens`` if both are given."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def length(self) -> int | None:
        return cast(int | None, getattr(self, self.length_field))

    @property
    def prompt_count(self) -> int | None:
        """As ``top_count``, for the prompt."""
        return self.prompt_logprobs

    @property
    @abstractmethod
    def top_count(self) -> int | None:
        """How many of the most probable tokens to report at each position; None for no log-probabilities."""


class _Completion(Common):
    default_length: ClassVar[int | None] = 16
    prompt: str | Annotated[list[str], SHORT] | Ids | Annotated[list[Ids], SHORT]
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its special tokens to a text prompt. The default is true, as in vLLM."""
    logprobs: TopCount | None = None
    echo: bool | None = None
    """Begin each choice with its prompt, and its log-probabilities with those of the prompt."""

    @property
    def top_count(self) -> int | None:
        return self.logprobs

    @property
    def prompt_count(self) -> int | None:
        return self.logprobs if self.echo and self.prompt_logprobs is None else self.prompt_logprobs


class _Chat(Common):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: TopCount | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """A variable of the chat template, as are ``chat_template_kwargs``."""
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None
    documents: Annotated[list[dict[str, Any]], SHORT] | None = None
    """Given to the chat template."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its own special tokens to those of the template."""

    @property
    def top_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


_SAMPLING: dict[str, Any] = {p.name: (p.type | None, None) for p in PARAMETERS}
CompletionBody = create_model("CompletionBody", __base__=_Completion, **_SAMPLING)
ChatBody = create_model("ChatBody", __base__=_Chat, **_SAMPLING)
Body = TypeVar("Body", bound=Common)


def read_body(cls: type[Body], raw: Any) -> tuple[Body, tuple[str, ...]]:
    """Checks a parsed request body. Returns it, and the names of the unknown fields.

    Raises:
        APIError: 400, naming the field.
    """
    if not isinstance(raw, dict):
        raise APIError(400, "the body must be a JSON object")
    strict_json.check(raw)
    fields = sort_fields(cls.model_fields, raw)
    body = read_fields(cls, fields.known)
    if body.stream_options is not None and body.stream_options.asking and not body.stream:
        raise APIError(400, "stream_options is only allowed when stream is true", param="stream_options")
    if getattr(body, "top_logprobs", None) and body.top_count is None:
        raise APIError(400, "top_logprobs is only allowed when logprobs is true", param="top_logprobs")
    if body.stream and body.prompt_logprobs is not None:
        raise APIError(400, "prompt_logprobs is only allowed when stream is false", param="prompt_logprobs")
    options = raw.get("stream_options") or {}
    nested = (f"stream_options.{name}" for name in options if name not in StreamOptions.model_fields)
    return body, (*fields.unknown, *nested)


def sampling_params(
    body: Common, *, max_tokens: int, seed: int, defaults: Mapping[str, Any], shape: Shape | None = None
) -> SamplingParams:
    """Returns the ``SamplingParams`` of one choice.

    Args:
        defaults: sampling parameters of the server, where the request leaves them out.
        shape: of a chat answer.

    Raises:
        APIError: 400: a value out of range.
    """
    fields: dict[str, Any] = {"max_tokens": max_tokens}
    for parameter in PARAMETERS:
        value = getattr(body, parameter.name)
        value = defaults.get(parameter.name, parameter.default) if value is None else value
        if value is not None:
            fields[parameter.sampling or parameter.name] = value
    fields |= {"seed": seed, "logprobs": body.top_count, "prompt_logprobs": body.prompt_count}
    if shape is None:
        fields["structured_outputs"] = structured_outputs(body.structured_outputs, body.response_format)
    else:
        fields["structured_outputs"] = shape.structured
        if shape.specials:
            fields["skip_special_tokens"] = False
    if fields.get("top_k") == -1:  # vLLM's value for all tokens
        fields["top_k"] = 0
    try:
        return SamplingParams(**fields)
    except RequestError as error:
        raise refused(error, structured_by(body) if shape is None else shape.structured_by) from None


def refused(error: RequestError, structured_by: str = "structured_outputs") -> APIError:
    """Translates the engine's refusal of a request. The error names the field if the message begins with one.

    Args:
        structured_by: the field that asked for structured output.
    """
    message = str(error)
    name = message.split(maxsplit=1)[0].rstrip(":").split(".")[0]
    if name == "structured_outputs":
        name = structured_by
        if name in ("response_format", "tools"):
            message = name + message[message.index(" ") :]
    elif name not in _SAMPLING and name not in ("priority", "prompt"):
        return as_api_error(error)
    return APIError(400, message, param=name, code="invalid_value")


def structured_by(body: Common) -> str:
    """Returns the field that asks for structured output, if one does."""
    return "structured_outputs" if body.structured_outputs is not None else "response_format"


def seeds(body: Common, count: int) -> list[int]:
    """Returns a seed for each choice, as ``LLM`` derives them; random ones if the request gives none."""
    given = cast(int | None, getattr(body, "seed", None))
    first = secrets.randbelow(MAX_SEED) if given in (None, RANDOM_SEED) else given % (MAX_SEED + 1)
    return [completion_seed(first, choice) for choice in range(count)]
