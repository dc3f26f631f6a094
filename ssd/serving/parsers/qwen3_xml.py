"""Tool calls of Qwen3-Coder: parameters between tags."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from .json_calls import CallReader
from .parser import CallIds
from .reader import Steps


class Qwen3XML(CallReader):
    """``<tool_call><function=NAME><parameter=KEY>value</parameter>...</function></tool_call>``.

    The arguments are JSON made of the parameters: a value is taken as JSON if it is that and the tool's schema does not
    say that it is a string; otherwise it is a string.

    Args:
        schemas: JSON schema of the arguments, by tool.
    """

    OPEN, CLOSE, FUNCTION, END = "<tool_call>", "</tool_call>", "<function=", "</function>"
    PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"

    def __init__(self, ids: CallIds, schemas: Mapping[str, Mapping[str, Any]], tokens: Collection[str] = ()):
        self._schemas = schemas
        super().__init__(ids, tokens)

    def _read(self) -> Steps[None]:
        while found := (yield from self._until((self.OPEN, self.FUNCTION), self._say)):
            start = self._at - len(found)
            if found == self.OPEN:
                yield from self._space()
                if not (yield from self._takes(self.FUNCTION)):
                    self._say_from(start)
                    continue
            name = yield from self._run_of(lambda character: character not in ">\n")
            if not name or not (yield from self._takes(">")):
                self._say_from(start)
                continue
            self._begin(name)
            yield from self._parameters(name)
            after = self._at
            yield from self._space()
            if not (yield from self._takes(self.CLOSE)) and not self._ended_by_cut:
                self._at = after

    def _parameters(self, name: str) -> Steps[None]:
        opening = "{"
        while True:
            after = self._at
            yield from self._space()
            found = yield from self._takes(self.PARAMETER, self.END)
            key = ""
            if found == self.PARAMETER:
                key = yield from self._run_of(lambda character: character not in ">\n")
                if not (yield from self._takes(">")):
                    found = None
            if found is None and self._ended_by_cut:
                return
            if found != self.PARAMETER:
                if found is None:
                    self._at = after
                if found or self._at < len(self._text):
                    self._argue("{}" if opening == "{" else "}")
                return
            pieces: list[str] = []
            whole = yield from self._until((self.PARAMETER_END,), pieces.append)
            value = _json("".join(pieces), parameter_schema(self._schemas.get(name, {}), key))
            self._argue(f"{opening}{json.dumps(key, ensure_ascii=False)}: {value if whole else value[:-1]}")
            if not whole:
                return
            opening = ", "


def parameter_schema(schema: Mapping[str, Any], key: str) -> Any:
    """Returns the schema of one parameter, with the definitions that it may refer to."""
    properties = schema.get("properties")
    own = properties.get(key, True) if isinstance(properties, Mapping) else True
    if not isinstance(own, Mapping):
        return own
    shared = {name: schema[name] for name in ("$defs", "definitions") if isinstance(schema.get(name), Mapping)}
    match str(own.get("$ref")).split("/"):
        case ["#", group, name] if name in shared.get(group, ()) and isinstance(shared[group][name], Mapping):
            own = {**shared[group][name], **{key: value for key, value in own.items() if key != "$ref"}}
    return {**shared, **own}


def _json(text: str, schema: Any) -> str:
    """Returns a parameter's text as JSON."""
    text = text.removeprefix("\n").removesuffix("\n")
    if not (isinstance(schema, Mapping) and schema.get("type") == "string"):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            return text.strip()
    return json.dumps(text, ensure_ascii=False)
