"""The opposite of a schema, where JSON Schema can say it without ``not``."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from .document import Document
from .exclusive import type_of
from .patterns import other_than
from .terms import ANNOTATIONS, TYPES, is_object

MAX_DEPTH = 8
_OPPOSITE_LIMITS = {
    "minimum": ("number", "exclusiveMaximum", 0),
    "maximum": ("number", "exclusiveMinimum", 0),
    "exclusiveMinimum": ("number", "maximum", 0),
    "exclusiveMaximum": ("number", "minimum", 0),
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
}
"""Keyword: its type, the opposite keyword, and what is added to the limit."""


class NotNegatable(ValueError):
    """The opposite cannot be said. The message is the keyword that prevents it."""


def negated(schema: Any, document: Document, path: str, depth: int = 0) -> Any:
    """Returns a schema of all values that are not valid under ``schema``.

    Raises:
        NotNegatable: There is none.
        SchemaError: A reference is wrong.
    """
    followed = document.followed(schema, path)
    if isinstance(followed, bool):
        return not followed
    return _opposite(followed, document, path, depth)


def _opposite(schema: Any, document: Document, path: str, depth: int) -> Any:
    if not is_object(schema) or depth > MAX_DEPTH:
        raise NotNegatable("not")

    def opposite(part: Any) -> Any:
        return negated(part, document, path, depth + 1)

    branches: list[Any] = []
    for keyword, value in schema.items():
        if keyword in ANNOTATIONS:
            continue
        if keyword == "type":
            branches.append(_other_types([value] if isinstance(value, str) else value))
        elif keyword in ("const", "enum"):
            branches += _other_values([value] if keyword == "const" else value)
        elif keyword in _OPPOSITE_LIMITS and type_of(value) in ("integer", "number"):
            branches += _beyond(keyword, value)
        elif keyword == "required":
            branches += [{"type": "object", "properties": {name: False}} for name in value]
        elif keyword == "properties":
            branches += [
                {"type": "object", "properties": {name: opposite(part)}, "required": [name]}
                for name, part in value.items()
                if part is not True and part != {}
            ]
        elif keyword == "allOf":
            branches += [opposite(part) for part in value]
        elif keyword == "anyOf":
            branches.append({"allOf": [opposite(part) for part in value]})
        elif keyword == "not":
            branches.append(value)
        elif keyword == "$ref":
            branches.append(opposite({"$ref": value}))
        else:
            raise NotNegatable(keyword)
    branches = [branch for branch in branches if branch is not False]
    return {"anyOf": branches} if branches else False


def _other_types(given: list[str]) -> Any:
    if "integer" in given and "number" not in given:
        raise NotNegatable("type")  # nothing says: a number that is not an integer
    excluded = {*given, "integer"} if "number" in given else {*given}
    left = [one for one in TYPES if one not in excluded and one != "integer"]
    return {"type": left} if left else False


def _other_values(given: list[Any]) -> list[Any]:
    kinds = {"number" if type_of(value) == "integer" else type_of(value) for value in given}
    if kinds & {"array", "object"}:
        raise NotNegatable("const" if len(given) == 1 else "enum")
    others = [one for one in TYPES if one not in kinds and one != "integer"]
    branches: list[Any] = [{"type": others}]
    if "string" in kinds:
        words = [value for value in given if isinstance(value, str)]
        branches.append({"type": "string", "pattern": other_than(words)})
    if "boolean" in kinds:
        branches += [{"const": value} for value in (True, False) if not any(one is value for one in given)]
    if "number" in kinds:
        limits = sorted({value for value in given if type_of(value) in ("integer", "number")})
        branches.append({"type": "number", "exclusiveMaximum": limits[0]})
        branches.append({"type": "number", "exclusiveMinimum": limits[-1]})
        branches += [
            {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high} for low, high in pairwise(limits)
        ]
    return branches


def _beyond(keyword: str, limit: float) -> list[Any]:
    kind, opposite, step = _OPPOSITE_LIMITS[keyword]
    return [] if limit + step < 0 and step else [{"type": kind, opposite: limit + step}]
