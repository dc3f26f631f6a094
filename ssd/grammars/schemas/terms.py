"""Words that all of this package uses."""

from __future__ import annotations

from typing import Any, TypeGuard

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
ANNOTATIONS = frozenset(
    {
        *("$anchor", "$comment", "$defs", "$id", "$schema", "$vocabulary", "contentEncoding", "contentMediaType"),
        *("contentSchema", "default", "definitions", "deprecated", "description", "discriminator", "example"),
        *("examples", "externalDocs", "id", "nullable", "readOnly", "title", "writeOnly", "xml"),
    }
)
"""Keywords that say nothing about which values are valid."""


class SchemaError(ValueError):
    """The schema is wrong, or asks for what cannot be held. The message names the keyword and its path."""

    def __init__(self, keyword: str, path: str, why: str):
        super().__init__(f"{keyword} at {path} {why}")


def is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def joined(path: str, *parts: str | int) -> str:
    """Returns the JSON pointer of what stands below a path."""
    return "/".join([path, *(str(part).replace("~", "~0").replace("/", "~1") for part in parts)])
