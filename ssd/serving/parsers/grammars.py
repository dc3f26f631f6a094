"""Grammars (in llguidance's Lark notation) of answers with tool calls, in the format that the model was trained on."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...grammars.compiler import WHITESPACE
from ...grammars.schemas.prepare import prepare
from . import harmony
from .formats import GPT_OSS, REASONING_FORMATS, AnswerFormat, Thinking, Tool
from .json_calls import Hermes, Llama3
from .mistral import Mistral
from .qwen3_xml import Qwen3XML, parameter_schema

ANYTHING = "/(?s:.*)/"
OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref", "if"}
"""Keywords of schemas that may add to the listed properties."""
SPACES = r"/[ \t\r\n]*/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What an answer with tool calls may look like.

    At least one call if ``forced``. Otherwise calls, or the answer: any text with calls in it, or JSON of the schema
    ``answer`` instead of calls.
    """

    tools: Sequence[Tool]
    forced: bool = False
    first_only: bool = False
    """At most one call."""
    answer: Mapping[str, Any] | None = None


def call_grammar(format: AnswerFormat, thinking: Thinking, asked: Asked) -> str:
    """Returns the grammar of an answer. Forced calls and those of strict tools follow the tools' schemas.

    Args:
        thinking: whether the answer begins with reasoning, which is free.

    Raises:
        SchemaError: a schema is wrong or cannot be held.
    """
    writer = _Harmony if format.calls == GPT_OSS else _Llama3 if format.calls == "llama3_json" else _Blocks
    return "\n".join(["%llguidance {}", *writer(format, thinking, asked).rules(), ""])


class _Writer(ABC):
    """Base of the writers of grammars. Rules: ``start``, ``think``, ``arguments_N`` of tool N, ``answer``."""

    def __init__(self, format: AnswerFormat, thinking: Thinking, asked: Asked):
        self._format, self._thinking, self._asked = format, thinking, asked

    def rules(self) -> list[str]:
        """Returns the lines of the grammar."""
        lines = self._start() if self._asked.tools else self._no_calls()
        for index, tool in enumerate(self._asked.tools):
            held = self._asked.forced or tool.strict
            lines.append(f"arguments_{index}: {self._arguments(tool, held)}")
        if self._asked.answer is not None:
            lines.append(f"answer: {_json(self._asked.answer)}")
        return lines

    @abstractmethod
    def _start(self) -> list[str]:
        """Returns ``start`` and the rules that it needs, but for those of arguments and ``answer``."""

    def _no_calls(self) -> list[str]:
        """Returns the same for an answer without calls."""
        thought, lines = self._thought()
        return [f"start: {thought}answer", *lines]

    def _arguments(self, tool: Tool, held: bool) -> str:
        return _json(_object(tool.schema if held else {}))

    def _marker(self, marker: str) -> str:
        """Returns a marker as an element of a rule: a token where it is one."""
        token = self._format.tokens.get(marker)
        return json.dumps(marker) if token is None else f"<[{token}]>"

    def _objects(self, key: str) -> str:
        """Returns alternatives for the JSON object of a call."""
        return _either(
            f'{json.dumps(_head(tool.name, key))} arguments_{index} "}}"'
            for index, tool in enumerate(self._asked.tools)
        )

    def _thought(self) -> tuple[str, list[str]]:
        """Returns the beginning of ``start`` with the reasoning, and the rules that it needs."""
        if self._thinking is Thinking.NO:
            return "", []
        opening, closing = REASONING_FORMATS[self._format.reasoning]
        end, rules = self._upto("think", closing)
        whole = f"{end} {SPACES}"
        if self._thinking is Thinking.PERHAPS:
            whole = f"({self._marker(opening)} {whole})?"
        return whole + " ", rules

    def _upto(self, name: str, marker: str) -> tuple[str, list[str]]:
        """Returns an expression for any text up to a marker and past it, and the rules that it needs."""
        if marker in self._format.tokens:
            return f"{ANYTHING} {self._marker(marker)}", []
        return name, [f"{name}[lazy]: /(?s:.*){_escaped(marker)}/"]


class _Blocks(_Writer):
    """Formats whose calls stand in blocks that a marker opens."""

    def _start(self) -> list[str]:
        thought, lines = self._thought()
        opening, block, between = self._block()
        calls = f"{self._marker(opening)} {block}"
        if between is not None and not self._asked.first_only:
            calls = f"{calls} ({between} {calls})*"
        if self._asked.forced:
            return [f"start: {thought}{calls}", *lines]
        if self._asked.answer is not None:
            return [f"start: {thought}({calls} | answer)", *lines]
        head, rules = self._upto("head", opening)
        repeat = "?" if self._asked.first_only else "*"
        free = f"FREE: {ANYTHING} & ~/(?s:.*){_escaped(opening)}(?s:.*)/"
        if opening in self._format.tokens:
            head = f"FREE {self._marker(opening)}"
        return [f"start: {thought}({head} {block}){repeat} FREE", free, *lines, *rules]

    def _block(self) -> tuple[str, str, str | None]:
        """Returns the marker that opens a block, an expression for the rest of the block, and one for what stands
        between two blocks; None if there can be only one."""
        if self._format.calls == "mistral" and Mistral.ARGS in self._format.tokens:
            named = _either(
                f"{json.dumps(tool.name)} {self._marker(Mistral.ARGS)} arguments_{index}"
                for index, tool in enumerate(self._asked.tools)
            )
            return Mistral.OPEN, named, ""
        if self._format.calls == "mistral":
            one = self._objects("arguments")
            more = "" if self._asked.first_only else f'(", " {one})*'
            return Mistral.OPEN, f'"[" {one} {more} "]"', None
        if self._format.calls == "qwen3_xml":
            functions = _either(
                f"{json.dumps(f'{Qwen3XML.FUNCTION}{tool.name}>' + chr(10))} arguments_{index}"
                for index, tool in enumerate(self._asked.tools)
            )
            end = json.dumps(f"{Qwen3XML.END}\n")
            return Qwen3XML.OPEN, f'"\\n" {functions} {end} {self._marker(Qwen3XML.CLOSE)}', '"\\n"'
        return Hermes.OPEN, f'"\\n" {self._objects("arguments")} "\\n" {self._marker(Hermes.CLOSE)}', '"\\n"'

    def _arguments(self, tool: Tool, held: bool) -> str:
        if self._format.calls != "qwen3_xml":
            return super()._arguments(tool, held)
        schema, parameters = _object(tool.schema), []
        for key in schema.get("properties", {}):
            own = parameter_schema(schema, key)
            parameter = f"{json.dumps(f'{Qwen3XML.PARAMETER}{key}>' + chr(10))} {_parameter(own, held)}"
            parameters.append(parameter if key in schema.get("required", ()) else f"({parameter})?")
        return " ".join(parameters) or '""'

    def rules(self) -> list[str]:
        lines = super().rules()
        if self._format.calls == "qwen3_xml":
            lines.append(f"text[lazy]: /(?s:.*)\\n{_escaped(Qwen3XML.PARAMETER_END)}\\n/")
        return lines


def _parameter(schema: Any, held: bool) -> str:
    """Returns an expression for a parameter's value and the tag that closes it. Of the schema of a text only ``enum``
    and ``const`` are held."""
    end = json.dumps(f"\n{Qwen3XML.PARAMETER_END}\n")
    if not held or schema is True:
        return "text"
    if isinstance(schema, dict) and schema.get("type") == "string":
        values = schema.get("enum", [schema["const"]] if "const" in schema else [])
        return f"{_either(map(json.dumps, values))} {end}" if values else "text"
    return f"{_json(schema)} {end}"


class _Llama3(_Writer):
    """Calls at the beginning of the answer."""

    def _start(self) -> list[str]:
        thought, lines = self._thought()
        one = self._objects("parameters")
        calls = one if self._asked.first_only else f'{one} ("; " {one})*'
        if self._asked.forced:
            return [f"start: {thought}{calls}", *lines]
        tag = self._marker(Llama3.TAG)
        if self._asked.answer is not None:
            # Without the tag both begin with a bracket, and the library would have to choose there.
            return [f"start: {thought}({tag} {calls} | answer)", *lines]
        calls = f"{tag}? {calls}"
        free = rf"FREE: /([ \t\r\n]*[^ \t\r\n{{](?s:.*))?/ & ~/(?s:.*){_escaped(Llama3.TAG)}(?s:.*)/"
        return [f"start: {thought}({calls} | FREE)", free, *lines]


class _Harmony(_Writer):
    """Messages in channels. After a call the model waits for its result, so there is one at most."""

    def _start(self) -> list[str]:
        start, channel, message, end, constrain = map(
            self._marker, (harmony.START, harmony.CHANNEL, harmony.MESSAGE, harmony.END, harmony.CONSTRAIN)
        )
        calls = _either(
            f'{json.dumps(f"commentary to=functions.{tool.name} ")} {constrain} "json" {message} arguments_{index}'
            for index, tool in enumerate(self._asked.tools)
        )
        again = f'{end} {start} "assistant" {channel}'
        if self._asked.forced:
            return [f'start: {channel} ("analysis" {message} FREE {again})? {calls}', self._free]
        said = "FREE" if self._asked.answer is None else "answer"
        before = f'{channel} (("analysis" | "commentary") {message} FREE {again})*'
        last = _either([*([calls] if self._asked.tools else []), f'"final" {message} {said}'])
        return [f"start: {before} {last}", self._free]

    _no_calls = _start

    @property
    def _free(self) -> str:
        """Text without markers."""
        spelled = [marker for marker in harmony.MARKERS if marker not in self._format.tokens]
        return f"FREE: {ANYTHING}" + "".join(f" & ~/(?s:.*){_escaped(marker)}(?s:.*)/" for marker in spelled)


def _json(schema: Any) -> str:
    """Returns an expression for JSON of a schema. Raises: SchemaError."""
    prepared = prepare(schema).schema
    if isinstance(prepared, dict):
        prepared = {**prepared, "x-guidance": {"whitespace_pattern": WHITESPACE}}
    return f"%json {json.dumps(prepared)}"


def _object(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a schema that only objects follow. Where it lists the arguments, there are no others."""
    only = {} if {*schema} & OPEN or "properties" not in schema else {"additionalProperties": False}
    return {**only, **schema, "type": "object"}


def _head(name: str, key: str) -> str:
    """Returns the JSON text of a call up to its arguments."""
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": '


def _either(alternatives: Any) -> str:
    return f"({' | '.join(alternatives)})"


def _escaped(marker: str) -> str:
    """Returns a marker for a regular expression between slashes."""
    return re.escape(marker).replace("/", "\\/")
