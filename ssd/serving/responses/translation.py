"""A Responses body as the chat body that asks for the same answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..http.bodies import passed_on
from ..http.errors import APIError
from ..openai.bodies import PARAMETERS, ChatBody
from ..openai.jobs import Job
from .bodies import (
    LOGPROBS,
    AllowedTools,
    FunctionTool,
    Item,
    JsonSchema,
    NamedTool,
    PlainText,
    ResponsesBody,
    TextConfig,
)
from .items import chat_messages

DOOR = "/v1/responses"
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
}
"""The client's name of each chat field that has another name here."""
EXTRAS = {"priority", "structured_outputs", "chat_template_kwargs"}
"""Chat fields, besides sampling parameters, that a Responses body may have."""
REFUSED = (set(ChatBody.model_fields) - {parameter.name for parameter in PARAMETERS} - EXTRAS) | set(NAMES)
NOTHING: tuple[Any, ...] = ([], {})
FOREIGN: dict[str, tuple[Any, ...] | None] = {
    "access_programs": None,
    "background": (False,),
    "background_options": None,
    "context_management": NOTHING,
    "conversation": NOTHING,
    "image": NOTHING,
    "max_tool_calls": None,  # of OpenAI's own tools
    "moderation": NOTHING,
    "n": (1,),
    "prompt": NOTHING,
    "prompt_cache_key": None,
    "prompt_cache_options": None,
    "prompt_cache_retention": None,
    "safety_identifier": None,
    "service_tier": None,
    "user": None,
}
"""Fields of the Responses API that have no effect here, and the values they may have; None for any."""


def chat_body(body: ResponsesBody, items: Sequence[Item]) -> dict[str, Any]:
    """Returns the chat body.

    Args:
        items: of the whole conversation.

    Raises:
        APIError: 400: a field is not supported.
    """
    chat: dict[str, Any] = passed_on(body.model_extra or {}, foreign=FOREIGN, refused=REFUSED, door=DOOR)
    instructions = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    chat |= {"messages": instructions + chat_messages(items), "stream": bool(body.stream)}
    own = {
        "model": body.model,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
    }
    chat |= {name: value for name, value in own.items() if value is not None}
    if body.stream_options is not None and not body.stream:
        raise APIError(400, "stream_options is only allowed when stream is true", param="stream_options")
    if body.reasoning is not None and body.reasoning.effort is not None:
        chat["reasoning_effort"] = body.reasoning.effort
    if LOGPROBS in (body.include or ()) or body.top_logprobs:
        chat |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    return chat | _text(body.text or TextConfig()) | _tools(body)


def _text(text: TextConfig) -> dict[str, Any]:
    chat: dict[str, Any] = {}
    if text.verbosity is not None:
        chat["verbosity"] = text.verbosity
    if isinstance(text.format, JsonSchema):
        schema = text.format.model_dump(by_alias=True, exclude_none=True, exclude={"type"})
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif text.format is not None and not isinstance(text.format, PlainText):
        chat["response_format"] = {"type": text.format.type}
    return chat


def _tools(body: ResponsesBody) -> dict[str, Any]:
    chat: dict[str, Any] = {}
    choice = body.tool_choice
    if body.tools:
        chat["tools"] = [_tool(tool) for tool in body.tools]
    if isinstance(choice, NamedTool):
        chat["tool_choice"] = _named(choice)
    elif isinstance(choice, AllowedTools):
        allowed = {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]}
        chat["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
    elif choice is not None:
        chat["tool_choice"] = choice
    if body.parallel_tool_calls is not None:
        chat["parallel_tool_calls"] = body.parallel_tool_calls
    return chat


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}


def _named(tool: NamedTool) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.name}}


def head(body: ResponsesBody, job: Job) -> dict[str, Any]:
    """Returns the fields of a response that repeat the request."""
    params = job.choices[0][1]
    text = body.text or TextConfig()
    shape = {"type": "text"} if text.format is None else text.format.model_dump(by_alias=True, exclude_none=True)
    choice = body.tool_choice
    return {
        "id": f"resp_{job.id}",
        "object": "response",
        "created_at": job.created,
        "model": job.model,
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": params.temperature,
        "text": {"format": shape, "verbosity": text.verbosity or "medium"},
        "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools or []],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": body.truncation or "disabled",
    }
