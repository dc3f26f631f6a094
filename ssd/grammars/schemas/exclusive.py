"""Whether two schemas can hold of one value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .document import Document
from .terms import TYPES, is_object

MAX_DEPTH = 12
MAX_STEPS = 100_000
"""Comparisons per document; beyond them schemas count as overlapping."""


def types(schema: dict[str, Any]) -> frozenset[str]:
    """Returns the types of valid values, as far as ``type``, ``const`` and ``enum`` say; ``number`` has ``integer``
    beside it."""
    given = schema.get("type", list(TYPES))
    found = {given} if isinstance(given, str) else {one for one in given if isinstance(one, str)}
    if "number" in found:
        found.add("integer")
    if (listed := values(schema)) is not None:
        found &= {type_of(value) for value in listed} | ({"number"} if any(map(_is_number, listed)) else set())
    return frozenset(found)


def values(schema: dict[str, Any]) -> list[Any] | None:
    """Returns the values that ``const`` or ``enum`` lists, or None without them."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) or value.is_integer() else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal. Inside lists and objects, True may count as 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


class Exclusion:
    """Tells which schemas of a document exclude one another.

    Args:
        document: What references refer to.
    """

    def __init__(self, document: Document):
        self._document, self._left = document, MAX_STEPS

    def overlaps(self, branches: list[Any], path: str) -> list[tuple[int, int]]:
        """Returns the pairs of branches under which one value may be valid, as indices.

        Raises:
            SchemaError: A reference is wrong.
        """
        pairs = [(first, second) for first in range(len(branches)) for second in range(first + 1, len(branches))]
        return [(a, b) for a, b in pairs if not self.excludes(branches[a], branches[b], path)]

    def excludes(self, one: Any, other: Any, path: str, depth: int = 0) -> bool:
        """Whether no value is valid under both schemas. False also where that cannot be seen."""
        self._left -= 1
        if depth > MAX_DEPTH or self._left < 0:
            return False
        one, other = self._document.followed(one, path), self._document.followed(other, path)
        if one is False or other is False:
            return True
        if not is_object(one) or not is_object(other):
            return False

        def inner(first: Any, second: Any) -> bool:
            return self.excludes(first, second, path, depth + 1)

        for schema, beside in ((one, other), (other, one)):
            for keyword in ("anyOf", "oneOf"):
                branches = schema.get(keyword)
                if isinstance(branches, list) and all(inner(branch, beside) for branch in branches):
                    return True
            parts = list(schema["allOf"]) if isinstance(schema.get("allOf"), list) else []
            if "$ref" in schema:
                parts.append({"$ref": schema["$ref"]})
            if any(inner(part, beside) for part in parts):
                return True
        if _lists_differ(one, other):
            return True
        common = types(one) & types(other)
        if not common:
            return True
        if common == {"object"}:
            return _objects_differ(one, other, inner)
        if common == {"array"}:
            return _arrays_differ(one, other, inner)
        if common <= {"integer", "number"}:
            return _ranges_differ(one, other)
        return common == {"string"} and _apart(one, other, "minLength", "maxLength")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lists_differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    listed, beside = values(one), values(other)
    if listed is None or beside is None:
        return False
    return not any(same(value, second) for value in listed for second in beside)


def _objects_differ(one: dict[str, Any], other: dict[str, Any], inner: Callable[[Any, Any], bool]) -> bool:
    required = dict.fromkeys([*_names(one), *_names(other)])
    return any(inner(_property(one, name), _property(other, name)) for name in required)


def _names(schema: dict[str, Any]) -> list[str]:
    required = schema.get("required")
    return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []


def _property(schema: dict[str, Any], name: str) -> Any:
    """Returns a schema that the property's value follows if the object follows ``schema``."""
    properties = schema.get("properties")
    if is_object(properties) and name in properties:
        return properties[name]
    return True if "patternProperties" in schema else schema.get("additionalProperties", True)


def _arrays_differ(one: dict[str, Any], other: dict[str, Any], inner: Callable[[Any, Any], bool]) -> bool:
    if _apart(one, other, "minItems", "maxItems"):
        return True
    length = max(_number(one, "minItems", 0), _number(other, "minItems", 0))

    def item(schema: dict[str, Any], index: int) -> Any:
        first = schema.get("prefixItems", [])
        return first[index] if index < len(first) else schema.get("items", True)

    longest = max(len(one.get("prefixItems", [])), len(other.get("prefixItems", [])), 1)
    return any(inner(item(one, index), item(other, index)) for index in range(int(min(length, longest))))


def _ranges_differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    for low, high in ((one, other), (other, one)):
        least = _number(low, "minimum", float("-inf"))
        most = _number(high, "maximum", float("inf"))
        above = _number(low, "exclusiveMinimum", float("-inf"))
        below = _number(high, "exclusiveMaximum", float("inf"))
        if least > most or above >= most or least >= below or above >= below:
            return True
    return False


def _apart(one: dict[str, Any], other: dict[str, Any], least: str, most: str) -> bool:
    return any(_number(low, least, 0) > _number(high, most, float("inf")) for low, high in ((one, other), (other, one)))


def _number(schema: dict[str, Any], keyword: str, default: float) -> float:
    value = schema.get(keyword, default)
    return value if _is_number(value) else default
