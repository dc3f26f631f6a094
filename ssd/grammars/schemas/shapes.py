"""What the value of each keyword of a schema must look like."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from .terms import ANNOTATIONS, TYPES, SchemaError, is_object, joined

MAX_DEPTH = 60
"""Schemas within schemas."""
MAX_SCHEMAS = 50_000

NOT_HELD = ("contains", "$dynamicRef", "$recursiveRef")
"""Keywords that are refused."""
_ONE = ("not", "if", "then", "else", "additionalProperties", "additionalItems", "contains", "propertyNames")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_types(value: Any) -> bool:
    return bool(value) and all(one in TYPES for one in ([value] if isinstance(value, str) else value))


_Rule = tuple[Callable[[Any], bool], str]
_NUMBER: _Rule = (_is_number, "a number")
_OPEN: _Rule = (lambda value: _is_number(value) or isinstance(value, bool), "a number")
_COUNT: _Rule = (_is_count, "a whole number, 0 or more")
_NAMES: _Rule = (_are_names, "a list of texts")
_FLAG: _Rule = (lambda value: isinstance(value, bool), "true or false")
_TEXT: _Rule = (lambda value: isinstance(value, str), "a text")
_MAP: _Rule = (is_object, "an object")
_SCHEMAS: _Rule = (lambda value: isinstance(value, list) and bool(value), "a list of schemas, at least one")
_LIST: _Rule = (lambda value: isinstance(value, list) and bool(value), "a list of values, at least one")
_NAMES_BY_NAME: _Rule = (
    lambda value: is_object(value) and all(map(_are_names, value.values())),
    "an object of lists of texts",
)
_TYPE: _Rule = (
    lambda value: isinstance(value, str | list) and _are_types(value),
    f"one or several of {', '.join(TYPES)}",
)
RULES: dict[str, _Rule] = {
    **dict.fromkeys(_LIMITS, _NUMBER),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), _OPEN),
    **dict.fromkeys(_COUNTS, _COUNT),
    **dict.fromkeys((*_MAPS, "dependencies"), _MAP),
    **dict.fromkeys(_LISTS, _SCHEMAS),
    **dict.fromkeys(("uniqueItems",), _FLAG),
    **dict.fromkeys(("pattern", "format", "$ref", "$anchor", "$id"), _TEXT),
    "required": _NAMES,
    "dependentRequired": _NAMES_BY_NAME,
    "type": _TYPE,
    "enum": _LIST,
}
KEYWORDS = frozenset({*RULES, *_ONE, *NOT_HELD, "items", "const", "unevaluatedItems", "unevaluatedProperties"})


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class ShapeCheck:
    """Checks the schemas of one document, each once."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        """Paths of the schemas that were checked."""

    def check(self, schema: Any, path: str, depth: int = 0) -> None:
        """Checks a schema and those within it.

        Raises:
            SchemaError: A keyword has a wrong value or looks misspelt, or the schema is too large.
        """
        if path in self.seen:
            return
        self.seen.add(path)
        if depth > MAX_DEPTH:
            raise SchemaError("the schema", path, f"is nested more than {MAX_DEPTH} schemas deep")
        if len(self.seen) > MAX_SCHEMAS:
            raise SchemaError("the schema", path, f"is beyond the {MAX_SCHEMAS} schemas that one may have")
        if isinstance(schema, bool):
            return
        if not is_object(schema):
            raise SchemaError("the schema", path, f"must be an object, true or false; got {shown(schema)}")
        for keyword, value in schema.items():
            if keyword in RULES:
                fits, rule = RULES[keyword]
                if not fits(value):
                    raise SchemaError(keyword, path, f"must be {rule}; got {shown(value)}")
            elif keyword not in KEYWORDS and keyword not in ANNOTATIONS and (near := _near(keyword)):
                raise SchemaError(keyword, path, f"is not a keyword (did you mean {near!r}?)")
            for name, part in _inner(keyword, value):
                self.check(part, joined(path, keyword, *name), depth + 1)


def _near(keyword: str) -> str | None:
    return next(iter(get_close_matches(keyword, KEYWORDS, n=1, cutoff=0.85)), None)


def _inner(keyword: str, value: Any) -> list[tuple[tuple[str | int, ...], Any]]:
    """Returns the schemas that a keyword's value contains, and where."""
    if keyword == "items" and isinstance(value, list):
        return [((index,), part) for index, part in enumerate(value)]
    if keyword in (*_ONE, "items") or keyword.startswith("unevaluated"):
        return [((), value)]
    if keyword in _LISTS:
        return [((index,), part) for index, part in enumerate(value)]
    if keyword in _MAPS:
        return [((name,), part) for name, part in value.items()]
    if keyword == "dependencies":
        return [((name,), part) for name, part in value.items() if not _are_names(part)]
    return []
