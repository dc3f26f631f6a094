"""A Messages body as the chat body that asks for the same answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ..http.bodies import passed_on
from ..http.errors import APIError
from ..openai.bodies import PARAMETERS, ChatBody
from .bodies import (
    AssistantMessage,
    CountBody,
    Message,
    MessagesBody,
    NamedToolChoice,
    Text,
    Thinking,
    ToolResult,
    ToolUse,
)

NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
}
"""The client's name of each chat field that has another name here."""
EXTRAS = {"priority", "structured_outputs", "chat_template_kwargs"}
"""Chat fields, besides sampling parameters, that a Messages body may have."""
REFUSED = (set(ChatBody.model_fields) - {parameter.name for parameter in PARAMETERS} - EXTRAS) | set(NAMES)
NOTHING: tuple[Any, ...] = ([], {})
FOREIGN: dict[str, tuple[Any, ...] | None] = {
    "cache_control": None,
    "container": NOTHING,
    "context_management": NOTHING,
    "diagnostics": None,
    "inference_geo": None,
    "metadata": None,
    "mcp_servers": NOTHING,
    "service_tier": None,
    "n": (1,),
    "speed": ("standard",),
    "user_profile_id": None,
    "workspace_id": None,
}
"""Fields of the Messages API that have no effect here, and the values they may have; None for any."""
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_body(body: CountBody, door: str) -> dict[str, Any]:
    """Returns the chat body.

    Args:
        door: the door's path, for messages.

    Raises:
        APIError: 400: a field is not supported.
    """
    extra = {name: value for name, value in (body.model_extra or {}).items() if not _keeps_context(name, value)}
    chat: dict[str, Any] = passed_on(extra, foreign=FOREIGN, refused=REFUSED, door=door)
    chat["messages"] = chat_messages(body)
    if body.model is not None:
        chat["model"] = body.model
    if isinstance(body.messages[-1], AssistantMessage):
        # The answer continues the client's last message.
        chat |= {"add_generation_prompt": False, "continue_final_message": True}
    if body.thinking is not None:
        # Templates ignore variables they do not know.
        given = chat.get("chat_template_kwargs") or {}
        if not isinstance(given, dict):
            raise APIError(400, "chat_template_kwargs must be an object", param="chat_template_kwargs")
        chat["chat_template_kwargs"] = {"enable_thinking": body.thinking.type != "disabled", **given}
    if body.output_config is not None and body.output_config.format is not None:
        schema = {"name": "output", "schema": body.output_config.format.schema_}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    if body.output_config is not None and body.output_config.effort is not None:
        chat["reasoning_effort"] = body.output_config.effort
    chat |= _tools(body)
    if isinstance(body, MessagesBody):
        chat |= {"max_tokens": body.max_tokens, "stream": bool(body.stream)}
        if body.stop_sequences:
            chat["stop"] = body.stop_sequences
    return chat


def _keeps_context(name: str, value: Any) -> bool:
    """Whether a field is a ``context_management`` that drops old thinking at most. Templates do that themselves."""
    edits = value.get("edits", []) if name == "context_management" and isinstance(value, dict) else [None]
    return isinstance(edits, list) and all(
        isinstance(edit, dict) and str(edit.get("type")).startswith("clear_thinking") for edit in edits
    )


def chat_messages(body: CountBody) -> list[dict[str, Any]]:
    """Returns the conversation as chat messages. A tool result is a message."""
    system = [] if body.system is None else [{"role": "system", "content": _content(body.system)}]
    return system + [message for given in body.messages for message in _chat_messages(given)]


def _chat_messages(message: Message) -> Iterator[dict[str, Any]]:
    if isinstance(message, AssistantMessage):
        yield _assistant(message)
        return
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    texts: list[Text] = []
    for block in message.content:
        if isinstance(block, ToolResult):
            if texts:
                yield {"role": message.role, "content": _content(texts)}
                texts = []
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _content(block.content or "")}
        else:
            texts.append(block)
    if texts or not message.content:
        yield {"role": message.role, "content": _content(texts)}


def _assistant(message: AssistantMessage) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": "assistant", "content": message.content}
    texts = [block for block in message.content if isinstance(block, Text)]
    calls = [block for block in message.content if isinstance(block, ToolUse)]
    thoughts = "".join(block.thinking for block in message.content if isinstance(block, Thinking))
    chat: dict[str, Any] = {"role": "assistant", "content": _content(texts)}
    if thoughts:
        chat["reasoning_content"] = thoughts
    if calls:
        chat["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.input, ensure_ascii=False)},
            }
            for call in calls
        ]
    return chat


def _content(given: str | Sequence[Text]) -> str | list[dict[str, str]]:
    """Returns chat content: one text as it is, several as parts."""
    if isinstance(given, str):
        return given
    if len(given) < 2:
        return given[0].text if given else ""
    return [{"type": "text", "text": block.text} for block in given]


def _tools(body: CountBody) -> dict[str, Any]:
    chat: dict[str, Any] = {}
    if body.tools:
        chat["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "parameters": tool.input_schema,
                    **({"description": tool.description} if tool.description is not None else {}),
                    **({"strict": tool.strict} if tool.strict is not None else {}),
                },
            }
            for tool in body.tools
        ]
    choice = body.tool_choice
    if choice is not None:
        if isinstance(choice, NamedToolChoice):
            chat["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        else:
            chat["tool_choice"] = CHOICES[choice.type]
        if choice.disable_parallel_tool_use is not None:
            chat["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return chat
