"""Request bodies of the Messages API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..http.bodies import MAX_ITEMS, SHORT, Body, Fields
from ..openai.bodies import Count


class Text(Fields):
    type: Literal["text"]
    text: str


class ToolUse(Fields):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResult(Fields):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[Text], SHORT] | None = None


class Thinking(Fields):
    type: Literal["thinking"]
    thinking: str


class RedactedThinking(Fields):
    """Reasoning that only Anthropic can read: it is dropped."""

    type: Literal["redacted_thinking"]


UserBlock = Annotated[Text | ToolResult, Field(discriminator="type")]
AssistantBlock = Annotated[Text | ToolUse | Thinking | RedactedThinking, Field(discriminator="type")]


class UserMessage(Fields):
    role: Literal["user"]
    content: str | Annotated[list[UserBlock], SHORT]


class AssistantMessage(Fields):
    role: Literal["assistant"]
    content: str | Annotated[list[AssistantBlock], SHORT]


class SystemMessage(Fields):
    role: Literal["system"]
    content: str | Annotated[list[Text], SHORT]


Message = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


class Tool(Fields):
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(Fields):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedToolChoice(Fields):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Fields):
    type: Literal["enabled", "adaptive", "between_tools", "disabled"]


class JsonFormat(Fields):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Fields):
    format: JsonFormat | None = None
    effort: str | None = None


class CountBody(Body):
    """/v1/messages/count_tokens."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    system: str | Annotated[list[Text], SHORT] | None = None
    tools: Annotated[list[Tool], SHORT] | None = None
    tool_choice: Annotated[ToolChoice | NamedToolChoice, Field(discriminator="type")] | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None


class MessagesBody(CountBody):
    """/v1/messages."""

    max_tokens: Count
    stop_sequences: Annotated[list[str], SHORT] | None = None
    stream: bool | None = None
