"""Error messages of the configuration: which keys there are, what each may hold, what was given."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from functools import cache
from typing import Any

import yaml
from pydantic import ValidationError

from .sections import Config


def describe(schema: dict[str, Any]) -> str:
    """Returns in words what a JSON schema allows."""
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
    if kind == "object" and "properties" not in schema:
        return "a mapping"
    if kind == "object":
        return "a mapping with the keys " + ", ".join(schema["properties"])
    return {"string": "a non-empty text", "boolean": "true or false", "null": "null"}[kind]


def given(tree: Any, dotted: str) -> str:
    """Returns the value of a dotted key as it was written, shortened to 60 characters."""
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else tree
    text = repr(tree)
    return text if len(text) <= 60 else f"{text[:57]}..."


def yaml_problem(error: yaml.YAMLError) -> str:
    """Returns what is wrong with a YAML text, and in which line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1})" if mark else problem


@cache
def keys() -> dict[str, list[dict[str, Any]]]:
    """Returns every dotted key with the JSON schemas its value may follow."""
    schema = Config.model_json_schema()
    found: dict[str, list[dict[str, Any]]] = {}

    def resolve(part: dict[str, Any]) -> dict[str, Any]:
        return schema["$defs"][part["$ref"].rsplit("/", 1)[1]] if "$ref" in part else part

    def walk(section: dict[str, Any], prefix: str) -> None:
        for name, part in section["properties"].items():
            options = [resolve(option) for option in part.get("anyOf", [part])]
            found[prefix + name] = options
            for option in options:
                if "properties" in option:
                    walk(option, f"{prefix}{name}.")

    walk(schema, "")
    return found


def is_section(dotted: str) -> bool:
    """Returns whether other keys stand below this one (the empty key is the whole configuration)."""
    return dotted == "" or any(key.startswith(f"{dotted}.") for key in keys())


def unknown(dotted: str) -> str:
    """Returns the message about a key that does not exist."""
    return f"unknown key {dotted} (nearest: {_nearest(dotted)})"


def _nearest(dotted: str) -> str:
    """Returns the valid key most similar to ``dotted``: as a whole, and in its last part."""

    def likeness(key: str) -> float:
        whole = SequenceMatcher(None, dotted, key).ratio()
        last = SequenceMatcher(None, dotted.rpartition(".")[2], key.rpartition(".")[2]).ratio()
        return whole + last

    return max(keys(), key=likeness)


def problems_in(error: ValidationError, tree: Mapping[str, Any]) -> str:
    """Returns all problems of a validation in one line: for each key what was given and what is allowed."""
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False):
        loc = [str(part) for part in item["loc"]]
        # Pydantic adds union members and list positions after the key.
        dotted = next((key for n in range(len(loc), 0, -1) if (key := ".".join(loc[:n])) in keys()), ".".join(loc))
        allowed = _allowed(dotted)
        if item["type"] == "missing":
            problems.setdefault(dotted, f"{dotted} is missing; it must be {allowed}")
        else:
            problems.setdefault(dotted, f"{dotted} must be {allowed}, not {given(tree, dotted)}")
    return "; ".join(problems.values())


def _allowed(dotted: str) -> str:
    return " or ".join(describe(option) for option in keys()[dotted])
