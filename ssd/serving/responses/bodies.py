"""Request bodies of the Responses API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..http.bodies import MAX_ITEMS, SHORT, Body, Fields
from ..openai.bodies import Count, TopCount

LOGPROBS = "message.output_text.logprobs"


class InputText(Fields):
    type: Literal["input_text"] = "input_text"
    text: str


class OutputText(Fields):
    type: Literal["output_text"] = "output_text"
    text: str


class Refusal(Fields):
    type: Literal["refusal"] = "refusal"
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


ContentPart = Annotated[InputText | OutputText | Refusal, Field(discriminator="type")]


class ReasoningText(Fields):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class Message(Fields):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[ContentPart], SHORT]
    id: str | None = None


class FunctionCall(Fields):
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str
    id: str | None = None


class FunctionCallOutput(Fields):
    type: Literal["function_call_output"] = "function_call_output"
    call_id: str
    output: str | Annotated[list[InputText], SHORT]
    id: str | None = None


class ReasoningItem(Fields):
    """Reasoning. Only its ``content`` is read: summaries and encrypted content are not the model's own words."""

    type: Literal["reasoning"] = "reasoning"
    content: Annotated[list[ReasoningText], SHORT] | None = None
    id: str | None = None


def _with_type(item: Any) -> Any:
    """Returns an item with its type; messages may leave it out."""
    return {"type": "message", **item} if isinstance(item, dict) and "role" in item else item


Item = Annotated[
    Annotated[Message | FunctionCall | FunctionCallOutput | ReasoningItem, Field(discriminator="type")],
    BeforeValidator(_with_type),
]


class FunctionTool(Fields):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Fields):
    type: Literal["function"]
    name: str


class AllowedTools(Fields):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], SHORT]


ToolChoice = Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedTools, Field(discriminator="type")]


class PlainText(Fields):
    type: Literal["text"]


class JsonObject(Fields):
    type: Literal["json_object"]


class JsonSchema(Fields):
    type: Literal["json_schema"]
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextConfig(Fields):
    format: Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")] | None = None
    verbosity: str | None = None


class Reasoning(Fields):
    effort: str | None = None


class StreamOptions(Fields):
    include_obfuscation: bool | None = None


Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""What an answer may include besides what it always has. Answers of this server have nothing of it but
log-probabilities."""


class ResponsesBody(Body):
    """/v1/responses."""

    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: Annotated[list[FunctionTool], SHORT] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: Annotated[list[Includable], SHORT] | None = None
    top_logprobs: TopCount | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
