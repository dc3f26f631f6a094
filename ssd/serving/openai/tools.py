"""Tools in chat bodies: what the model may call, whether it must, and what that asks of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ...grammars.schemas.terms import SchemaError
from ..http.errors import APIError, shown
from ..parsers.formats import GPT_OSS, NONE, AnswerFormat, Thinking, Tool
from ..parsers.grammars import Asked, call_grammar
from ..parsers.parser import MakeParser
from .messages import Stored, refuse
from .structured import ResponseFormat, StructuredOutputs, structured_outputs

MAX_TOOLS = 1024
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

Name = Annotated[str, Field(pattern=r"^[^\s<>{}\[\]\"\\]{1,256}$")]


class Function(Stored):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments. None: there are none."""
    strict: bool | None = None
    """Hold the arguments to the schema also where the model is free to call or not."""

    @field_validator("parameters")
    @classmethod
    def _check_type(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        if parameters and parameters.get("type", "object") != "object":
            raise refuse("the arguments of a function are an object; give a schema of the type 'object'")
        return parameters


class FunctionTool(Stored):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """Returns the description that chat templates show to the model."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": self.type, "function": function}


class NamedFunction(Stored):
    name: Name


class NamedTool(Stored):
    type: Literal["function"] = "function"
    function: NamedFunction


class Allowed(Stored):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Stored):
    type: Literal["allowed_tools"]
    allowed_tools: Allowed


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """What a request says about tools."""

    shown: list[dict[str, Any]] | None = None
    """What the chat template shows to the model."""
    tools: tuple[Tool, ...] | None = None
    """What the model may call. None: nothing."""
    forced: bool = False
    first_only: bool = False

    @classmethod
    def of(
        cls,
        tools: Sequence[FunctionTool] | None,
        choice: ToolChoice | None,
        parallel: bool | None,
        *,
        format: AnswerFormat,
    ) -> ToolUse:
        """Reads ``tools``, ``tool_choice`` and ``parallel_tool_calls``.

        Raises:
            APIError: 400: they do not fit together.
        """
        if not tools:
            if choice not in (None, "none", "auto"):
                raise APIError(400, "tool_choice is only allowed with tools", param="tool_choice", code="invalid_value")
            return cls()
        if choice == "none":
            return cls()
        if format.calls == NONE:
            raise APIError(
                400,
                "this server does not read tool calls (server.tool_parser=none)",
                param="tools",
                code="unsupported_parameter",
            )
        forced, names = choice == "required", None
        if isinstance(choice, NamedTool):
            forced, names = True, {choice.function.name}
        elif isinstance(choice, AllowedTools):
            allowed = choice.allowed_tools
            forced, names = allowed.mode == "required", {tool.function.name for tool in allowed.tools}
        if missing := (names or set()) - {tool.function.name for tool in tools}:
            name = shown(min(missing))
            raise APIError(
                400, f"tool_choice names '{name}', which is not in tools", param="tool_choice", code="invalid_value"
            )
        callable_tools = tuple(
            Tool(
                name=tool.function.name,
                schema=tool.function.parameters or NO_ARGUMENTS,
                strict=bool(tool.function.strict),
            )
            for tool in tools
            if names is None or tool.function.name in names
        )
        return cls(
            shown=[tool.for_template() for tool in tools],
            tools=callable_tools,
            forced=forced,
            # A named function is called once, as in OpenAI's API.
            first_only=parallel is False or isinstance(choice, NamedTool),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What an answer must look like, and how it is read."""

    structured: dict[str, Any] | None
    """Fields of ``StructuredOutputsParams``."""
    structured_by: str
    """The field of the request that asks for it."""
    parser: MakeParser
    specials: bool
    """Whether the parser needs the texts of special tokens."""


def shape(
    use: ToolUse,
    format: AnswerFormat,
    prompt_end: str,
    *,
    structured: StructuredOutputs | None,
    response_format: ResponseFormat | None,
    show_specials: bool = False,
) -> Shape:
    """Returns the shape of the answer to a chat request.

    Args:
        prompt_end: the last characters of the prompt, special tokens included.
        structured, response_format: fields of the request.
        show_specials: special tokens that are no markers are part of the text.

    Raises:
        APIError: 400: the fields do not fit together.
    """
    thinking = format.thinking(prompt_end)
    asked = structured_outputs(structured, response_format)
    answer = None if structured is not None else _json_answer(response_format)
    by = "structured_outputs" if structured is not None else "response_format"
    thinks = asked is None
    if use.forced and structured is not None:
        raise APIError(
            400,
            "structured_outputs and a tool_choice that forces a call cannot both be given",
            param="structured_outputs",
            code="invalid_value",
        )
    tools = use.tools or ()
    held = use.forced or (answer is not None and tools) or (asked is None and any(tool.strict for tool in tools))
    if held or (answer is not None and (thinking is not Thinking.NO or format.calls == GPT_OSS)):
        wanted = Asked(tools=tools, forced=use.forced, first_only=use.first_only, answer=None if use.forced else answer)
        by = "tools" if tools else by
        try:
            asked, thinks = {"grammar": call_grammar(format, thinking, wanted)}, True
        except SchemaError as error:
            raise APIError(400, f"{by} cannot be used: {error}", param=by, code="invalid_value") from None
    parser = format.parser(
        prompt_end, tools=use.tools, first_only=use.first_only, thinks=thinks, show_specials=show_specials
    )
    return Shape(structured=asked, structured_by=by, parser=parser, specials=format.special)


def _json_answer(format: Any) -> dict[str, Any] | None:
    """Returns the JSON schema that ``response_format`` asks for, if it asks for JSON."""
    if format is None or format.type == "text":
        return None
    return {"type": "object"} if format.type == "json_object" else format.json_schema.schema_
