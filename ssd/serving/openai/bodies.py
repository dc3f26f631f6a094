"""Request bodies of the OpenAI API, and how their fields become ``SamplingParams``.

Every field is either supported, or refused with an error that names it. Nothing is ignored except fields
that do not concern the answer (``user``, ``metadata``).
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field, ValidationError, create_model

from ...errors import RequestError
from ...request.methods import ServedMethod
from ...request.sampling_params import MAX_LOGPROBS, MAX_SEED, SamplingParams, completion_seed
from ..http import strict_json
from ..http.errors import APIError, as_api_error, shown
from .fields import supported
from .messages import ChatMessage, Strict
from .structured import ResponseFormat, StructuredOutputs, structured_outputs

MAX_STOPS = 16
MAX_NAMED = 1024
"""Entries of ``logit_bias`` and ``bad_words``."""
MAX_CHOICES = 128
"""Prompts × n of one request."""
MAX_PRIORITY = 2**31 - 1
MAX_INT64 = 2**63 - 1
MAX_FLOAT32 = 3.4028234e38
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions; chat answers may fill the context."""

Number = Annotated[float, Field(ge=-MAX_FLOAT32, le=MAX_FLOAT32)]
Integer = Annotated[int, Field(ge=-MAX_INT64, le=MAX_INT64)]
Count = Annotated[int, Field(ge=1, le=MAX_INT64)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT64)]
Stop = str | Annotated[list[str], Field(max_length=MAX_STOPS)]


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
    Parameter("top_k", Annotated[int, Field(ge=-1, le=MAX_INT64)]),
    Parameter("min_p", Number),
    Parameter("stop", Stop),
    Parameter("stop_token_ids", list[TokenId]),
    Parameter("ignore_eos", bool),
    Parameter("include_stop_str_in_output", bool),
    Parameter("min_tokens", Integer),
    Parameter("presence_penalty", Number),
    Parameter("frequency_penalty", Number),
    Parameter("repetition_penalty", Number),
    Parameter("logit_bias", Annotated[dict[str, Number], Field(max_length=MAX_NAMED)]),
    Parameter("bad_words", Annotated[list[str | list[TokenId]], Field(max_length=MAX_NAMED)]),
    Parameter("allowed_token_ids", list[TokenId]),
    Parameter("method", ServedMethod),
    Parameter("seed", Annotated[int, Field(ge=-(2**63), le=MAX_SEED)]),
)
"""A new sampling parameter is one line here, and must not be in ``UNSUPPORTED``."""


class StreamOptions(Strict):
    include_usage: bool | None = None


class Common(Strict):
    """Fields that both endpoints have, beside ``PARAMETERS``."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """As in vLLM."""
    max_tokens: Count | None = None
    provenance: bool | None = None
    """Our extension: report for each token where it came from."""
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    """As in vLLM: lower values go first. Values other than 0 need ``engine.scheduling=priority``."""
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None

    @property
    @abstractmethod
    def top_count(self) -> int | None:
        """How many of the most probable tokens to report at each position; None for no log-probabilities."""


class _Completion(Common):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def top_count(self) -> int | None:
        return self.logprobs


class _Chat(Common):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def top_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


_SAMPLING: dict[str, Any] = {p.name: (p.type | None, None) for p in PARAMETERS}
CompletionBody = create_model("CompletionBody", __base__=_Completion, **_SAMPLING)
ChatBody = create_model("ChatBody", __base__=_Chat, **_SAMPLING)
Body = TypeVar("Body", bound=Common)


def read_body(cls: type[Body], raw: Any) -> Body:
    """Checks a parsed request body.

    Raises:
        APIError: 400, naming the field.
    """
    if not isinstance(raw, dict):
        raise APIError(400, "the body must be a JSON object")
    strict_json.check(raw)
    try:
        body = cls.model_validate(supported(cls.model_fields, raw))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        parts = [str(part) for part in first["loc"]]
        at = ".".join(shown(part) for part in parts if not part.startswith(("list[", "function-", "union")))
        raise APIError(400, f"{at}: {first['msg']}", param=parts[0], code="invalid_value") from None
    if body.stream_options is not None and not body.stream:
        raise APIError(400, "stream_options is only allowed when stream is true", param="stream_options")
    if getattr(body, "top_logprobs", None) and body.top_count is None:
        raise APIError(400, "top_logprobs is only allowed when logprobs is true", param="top_logprobs")
    return body


def sampling_params(body: Common, *, max_tokens: int, seed: int) -> SamplingParams:
    """Returns the ``SamplingParams`` of one choice.

    Raises:
        APIError: 400: a value out of range.
    """
    fields: dict[str, Any] = {"max_tokens": max_tokens}
    for parameter in PARAMETERS:
        value = getattr(body, parameter.name)
        value = parameter.default if value is None else value
        if value is not None:
            fields[parameter.sampling or parameter.name] = value
    fields["seed"], fields["logprobs"] = seed, body.top_count
    fields["structured_outputs"] = structured_outputs(body.structured_outputs, body.response_format)
    if fields.get("top_k") == -1:  # vLLM's value for all tokens
        fields["top_k"] = 0
    try:
        return SamplingParams(**fields)
    except RequestError as error:
        raise refused(error, structured_by(body)) from None


def refused(error: RequestError, structured_by: str = "structured_outputs") -> APIError:
    """Translates the engine's refusal of a request. The error names the field if the message begins with one.

    Args:
        structured_by: the field that asked for structured output.
    """
    message = str(error)
    name = message.split(maxsplit=1)[0].rstrip(":").split(".")[0]
    if name == "structured_outputs":
        name = structured_by
        if name == "response_format":
            message = name + message[message.index(" ") :]
    elif name not in _SAMPLING and name != "priority":
        return as_api_error(error)
    return APIError(400, message, param=name, code="invalid_value")


def structured_by(body: Common) -> str:
    """Returns the field that asks for structured output, if one does."""
    return "structured_outputs" if body.structured_outputs is not None else "response_format"


def seeds(body: Common, count: int) -> list[int]:
    """Returns a seed for each choice, as ``LLM`` derives them; random ones if the request gives none."""
    given = cast(int | None, getattr(body, "seed", None))
    first = secrets.randbelow(MAX_SEED) if given is None else given % (MAX_SEED + 1)
    return [completion_seed(first, choice) for choice in range(count)]
