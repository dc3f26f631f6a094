"""Chat messages and their parts, as requests carry them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from ..http import strict_json
from ..http.bodies import SHORT
from ..http.errors import APIError

NOT_TEXT = {
    "image": "images",
    "image_url": "images",
    "input_image": "images",
    "audio_url": "audio",
    "input_audio": "audio",
    "video_url": "videos",
    "file": "files",
    "input_file": "files",
}
"""Types of parts that a model of text cannot read, and what messages call them."""


class Strict(BaseModel):
    """Base of all bodies: unknown fields are errors, and no value is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Stored(BaseModel):
    """Base of what clients keep and send back: unknown fields (``id``, ``timestamp``, ``cache_control``) are ignored,
    and no value is converted."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


def refuse(why: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{why}", {"why": why})


def _as_text_parts(content: Any) -> Any:
    """Returns text parts for parts that hold text in another way. Raises: PydanticCustomError: a part is not text."""
    if not isinstance(content, list):
        return content
    parts = []
    for index, part in enumerate(content):
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        elif isinstance(part, dict):
            kind = part.get("type")
            if isinstance(kind, str) and kind in NOT_TEXT:
                raise refuse(f"part {index}: {NOT_TEXT[kind]} are not supported; this server reads text")
            if kind == "refusal":
                part = {"type": "text", "text": part.get("refusal")}
        parts.append(part)
    return parts


class TextPart(Stored):
    type: Literal["text", "input_text", "output_text"] = "text"
    text: str


Content = Annotated[str | Annotated[list[TextPart], SHORT] | None, BeforeValidator(_as_text_parts)]


class CalledFunction(Stored):
    name: str
    arguments: str | dict[str, Any] | None = None
    """The text of a JSON object, or the object."""

    def for_template(self) -> dict[str, Any]:
        """Returns name and arguments. Templates take arguments as a mapping; text that is not a JSON object stays as
        it is, so that a model sees what it wrote."""
        arguments = self.arguments or {}
        if isinstance(arguments, str):
            try:
                parsed = strict_json.parse(arguments.encode())
                strict_json.check(parsed)
            except APIError:
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else arguments
        return {"name": self.name, "arguments": arguments}


class ToolCall(Stored):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        return {"id": self.id, "type": self.type, "function": self.function.for_template()}


class ChatMessage(Stored):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    refusal: str | None = None
    """What an assistant message says instead of ``content``."""
    reasoning: str | None = None
    reasoning_content: str | None = None
    """Another name for ``reasoning``."""
    tool_calls: Annotated[list[ToolCall], SHORT] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_old_fields(cls, message: Any) -> Any:
        if isinstance(message, dict):
            if message.get("role") == "function" or message.get("function_call") is not None:
                raise refuse("function_call and the role 'function' are not supported; use tool_calls and 'tool'")
            if message.get("audio") is not None:
                raise refuse("audio is not supported; this server reads text")
        return message

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if not self.content and not isinstance(self.content, str) and self.role not in ("assistant", "tool"):
            raise refuse("content is missing; only messages of the roles 'assistant' and 'tool' may have none")
        return self

    def for_template(self) -> dict[str, Any]:
        """Returns the message as chat templates take it. ``content`` is a text, or a list of text parts."""
        content: Any = self.content
        if content is None:
            content = self.refusal or ""
        elif not isinstance(content, str):
            content = [{"type": "text", "text": part.text} for part in content]
        message = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content,
            "name": self.name,
            "reasoning_content": self.reasoning if self.reasoning is not None else self.reasoning_content,
            "tool_calls": [call.for_template() for call in self.tool_calls or ()] or None,
            "tool_call_id": self.tool_call_id,
        }
        return {key: value for key, value in message.items() if value is not None}
