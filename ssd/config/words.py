"""Words for what a configuration holds and what it may hold; for its error messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


def describe(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = schema["type"]
    if kind in ("integer", "number"):
        noun = "an integer" if kind == "integer" else "a number"
        bounds = (
            ("minimum", "of at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if "minimum" in schema and "maximum" in schema:
            return f"{noun} from {schema['minimum']} to {schema['maximum']}"
        limits = [f"{words} {schema[bound]:g}" for bound, words in bounds if bound in schema]
        return " ".join([noun, " and ".join(limits)]).strip()
    if kind == "array":
        texts = schema["items"].get("type") == "string"
        least = ", at least one" if schema.get("minItems") else ""
        return "a list of non-empty texts" if texts else f"a list of integers >= 0{least}"
    if kind == "object":
        return "a mapping with the keys " + ", ".join(schema["properties"])
    return {"string": "a non-empty text", "boolean": "true or false", "null": "null"}[kind]


def given(tree: Any, dotted: str) -> str:
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else tree
    text = repr(tree)
    return text if len(text) <= 60 else f"{text[:57]}..."


def first_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1})" if mark else problem
