"""Strategies for request bodies, derived from the server's own models of them: valid, broken and hostile ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from ssd.serving.openai.bodies import ChatBody, CompletionBody
from ssd.serving.openai.fields import CONSTRAINTS, HARMLESS, UNSUPPORTED

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON_KIND = "application/json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One request."""

    path: str
    raw: bytes
    kind: str = JSON_KIND
    """Its content type."""


hostile_text = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "\ud800", "a\udfffb", "\x00", "\ufeff", "\n\n", "a" * 3000, "{{ x }}", "(a*)*" * 9, "𝔘", "NaN"]
    ),
)
hostile_number = st.one_of(
    st.integers(-3, 130),
    st.sampled_from([2**31, 2**63 - 1, -(2**63), 2**63, 2**64, -(2**64), 10**39, 10**400, 1e39, 1e308, -1e39, 5e-324]),
    st.floats(),
)
hostile_leaf = st.none() | st.booleans() | hostile_number | hostile_text
hostile = st.recursive(
    hostile_leaf,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(hostile_text, inner, max_size=3),
    max_leaves=6,
)


def of_schema(schema: dict[str, Any], named: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Returns a strategy for values of a JSON schema as pydantic writes them; ``named``: its ``$defs``."""
    if "$ref" in schema:
        target = schema["$ref"].rpartition("/")[2]
        return st.deferred(lambda: of_schema(named[target], named))
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return st.one_of(*(of_schema(option, named) for option in schema[union]))
    match schema.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            low, high = schema.get("minimum", -(2**63)), schema.get("maximum", 2**63)
            return st.integers(max(low, -2), min(high, 6)) | st.integers(low, high)
        case "number":
            bounds = {"min_value": schema.get("minimum"), "max_value": schema.get("maximum")}
            return st.sampled_from([0, 0.5, 1.0]) | st.floats(**bounds, allow_nan=False)
        case "string":
            sized = st.text(min_size=schema.get("minLength", 0), max_size=schema.get("maxLength", 8))
            return st.from_regex(schema["pattern"], fullmatch=True) if "pattern" in schema else sized
        case "array":
            low = schema.get("minItems", 0)
            return st.lists(of_schema(schema.get("items", {}), named), min_size=low, max_size=low + 3)
        case "object" if "properties" in schema:
            needed = schema.get("required", [])
            parts = {name: of_schema(part, named) for name, part in schema["properties"].items()}
            optional = {name: part for name, part in parts.items() if name not in needed}
            return st.fixed_dictionaries({name: parts[name] for name in needed}, optional=optional)
        case "object":
            inner = schema.get("additionalProperties", True)
            values = of_schema(inner, named) if isinstance(inner, dict) else hostile_leaf
            return st.dictionaries(st.sampled_from(["1", "5", "type", "x", "99999"]), values, max_size=3)
    return hostile_leaf


LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0, 0.7, 1.0, 2]),
    "top_p": st.floats(0.01, 1),
    "min_p": st.floats(0, 1),
    "top_k": st.integers(-1, 50),
    "n": st.integers(1, 4),
    "min_tokens": st.integers(0, 3),
    "repetition_penalty": st.floats(0.1, 3),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "stop_token_ids": st.lists(st.integers(0, 100), max_size=3),
    "allowed_token_ids": st.lists(st.integers(0, 100), min_size=1, max_size=3),
    "logit_bias": st.dictionaries(st.integers(0, 100).map(str), st.floats(-100, 100), max_size=3),
    "bad_words": st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=2) | st.text(min_size=1), max_size=2),
    "method": st.sampled_from(["none", "sd", "ssd"]),
    "priority": st.just(0),
    "stream_options": st.sampled_from([None, {"include_usage": True}, {"continuous_usage_stats": True}]),
    "chat_template_kwargs": st.just({"enable_thinking": False}),
    "continue_final_message": st.booleans(),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    "structured_outputs": st.sampled_from(
        [{"regex": "a{2,4}"}, {"choice": ["x", "yy"]}, {"json": {"type": "integer"}}]
    ),
}
"""Values that make sense where a field's type alone would seldom give one."""


class Bodies:
    """Strategies for the requests of one server.

    Args:
        model: its model's name.
    """

    def __init__(self, model: str):
        self._model = model
        self._fields: dict[str, dict[str, st.SearchStrategy[Any]]] = {}
        for path, kind in ((TEXT, CompletionBody), (CHAT, ChatBody)):
            schema = kind.model_json_schema()
            named = schema.get("$defs", {})
            self._fields[path] = {name: of_schema(part, named) for name, part in schema["properties"].items()}
        self._prompts = st.text(min_size=1, max_size=12) | st.lists(st.integers(0, 100), min_size=1, max_size=12)
        self._messages = st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": st.text(max_size=12)}
            ),
            min_size=1,
            max_size=3,
        )

    @property
    def cases(self) -> st.SearchStrategy[Case]:
        return st.composite(self._case)()

    def _case(self, draw: Any) -> Case:
        path = draw(st.sampled_from([TEXT, CHAT]))
        body = self._valid(draw, path)
        style = draw(st.sampled_from(["valid", "typed", "broken", "broken", "raw", "anything"]))
        if style == "typed":  # right by type, whatever it means
            name = draw(st.sampled_from(sorted(self._fields[path])))
            body[name] = draw(self._fields[path][name])
        elif style == "broken":
            for _ in range(draw(st.integers(1, 2))):
                self._break(draw, path, body)
        elif style == "anything":
            return Case(path=path, raw=json.dumps(draw(hostile)).encode(), kind=self._kind(draw))
        raw = json.dumps(body).encode()
        return (
            Case(path=path, raw=self._damaged(draw, raw), kind=self._kind(draw))
            if style == "raw"
            else Case(path=path, raw=raw)
        )

    def _valid(self, draw: Any, path: str) -> dict[str, Any]:
        """A body that should work, unless its fields contradict each other."""
        body: dict[str, Any] = {"model": self._model, "max_tokens": draw(st.integers(1, 8))}
        body |= {"messages": draw(self._messages)} if path == CHAT else {"prompt": draw(self._prompts)}
        if draw(st.booleans()):
            body["stream"] = True
        for name in draw(st.lists(st.sampled_from(sorted(LIKELY)), max_size=3, unique=True)):
            body[name] = draw(LIKELY[name])
        return body

    def _break(self, draw: Any, path: str, body: dict[str, Any]) -> None:
        known = st.sampled_from(sorted({*self._fields[path], *UNSUPPORTED, *HARMLESS, *CONSTRAINTS}))
        match draw(st.sampled_from(["hostile", "hostile", "remove", "wrap", "unknown"])):
            case "hostile":
                body[draw(known)] = draw(hostile)
            case "remove" if body:
                del body[draw(st.sampled_from(sorted(body)))]
            case "wrap" if body:
                name = draw(st.sampled_from(sorted(body)))
                for _ in range(draw(st.sampled_from([1, 2, 90, 120, 500]))):
                    body[name] = [body[name]]
            case _:
                body[draw(hostile_text)] = draw(hostile)

    def _damaged(self, draw: Any, raw: bytes) -> bytes:
        at = draw(st.integers(0, len(raw)))
        match draw(st.sampled_from(["cut", "insert", "flip", "twice", "literal", "deep", "empty"])):
            case "cut":
                return raw[:at]
            case "insert":
                return raw[:at] + draw(st.binary(min_size=1, max_size=6)) + raw[at:]
            case "flip" if at < len(raw):
                return raw[:at] + bytes([raw[at] ^ draw(st.integers(1, 255))]) + raw[at + 1 :]
            case "twice":
                return raw[:-1] + b', "max_tokens": 1, "max_tokens": 2}'
            case "literal":
                literal = draw(
                    st.sampled_from(["NaN", "-Infinity", "1e999", "-0", "9" * 5000, "1e-999", "0x1", "01", "'x'"])
                )
                name = draw(st.sampled_from(["temperature", "seed", "top_k", "user"]))
                return raw[:-1] + f', "{name}": {literal}}}'.encode()
            case "deep":
                levels = draw(st.sampled_from([50, 99, 150, 2000, 100_000]))
                return raw[:-1] + b', "metadata": ' + b'{"a":' * levels + b"1" + b"}" * levels + b"}"
        return draw(st.sampled_from([b"", b" ", b"\xff\xfe", b"\xef\xbb\xbf{}", b"null", raw * 2]))

    def _kind(self, draw: Any) -> str:
        kinds = [JSON_KIND] * 6 + ["application/json; charset=utf-8", "text/plain", "", "application/json;;", "a/b"]
        return draw(st.sampled_from(kinds))
