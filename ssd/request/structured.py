"""Structured output: what a text may look like. Values only; ``pipeline/grammar.py`` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from ..errors import RequestError

KINDS = ("json", "regex", "choice", "grammar", "json_object")
MAX_BYTES = 256 * 1024
"""Of a schema, regular expression, grammar or list of choices: it crosses the lanes with its request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """Exactly one of the five kinds. Names and meanings are vLLM's.

    Raises:
        RequestError: none or several of them, or a value of another type. Whether a schema or a
            grammar can be compiled is seen when the request is made.
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema, as a mapping or as text. Kept as text."""
    regex: str | None = None
    """The whole output matches it (Rust's ``regex`` syntax: no look-around, no back-references)."""
    choice: tuple[str, ...] | None = None
    """The output is one of these texts."""
    grammar: str | None = None
    """A context-free grammar, in Lark's notation or in GBNF."""
    json_object: bool | None = None
    """Any JSON object."""
    disable_any_whitespace: bool = False
    """JSON without whitespace between its tokens."""
    whitespace_pattern: str | None = None
    """JSON with whitespace that matches this regular expression, and no other."""

    def __post_init__(self) -> None:
        if self.json is not None and not isinstance(self.json, str):
            object.__setattr__(self, "json", _schema_text(self.json))
        if isinstance(self.choice, list):
            object.__setattr__(self, "choice", tuple(self.choice))
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs takes exactly one of {', '.join(KINDS)}"
                + (f", not {' and '.join(given)}" if given else "; none was given")
            )
        checks = (
            *((_is_text(getattr(self, kind)), f"{kind} must be a text, not empty") for kind in ("regex", "grammar")),
            (_is_text(self.json), "json must be a JSON schema: an object, or its text"),
            (
                self.choice is None
                or (isinstance(self.choice, tuple) and self.choice and all(map(_is_text, (*self.choice, "x")))),
                "choice must be a list of texts, none of them empty",
            ),
            (self.json_object in (None, True), "json_object must be true or false"),
            (isinstance(self.disable_any_whitespace, bool), "disable_any_whitespace must be true or false"),
            (_is_text(self.whitespace_pattern), "whitespace_pattern must be a regular expression, not empty"),
            (
                not (self.disable_any_whitespace and self.whitespace_pattern),
                "disable_any_whitespace and whitespace_pattern cannot both be given",
            ),
            (
                not (self.disable_any_whitespace or self.whitespace_pattern) or given[0] in ("json", "json_object"),
                "disable_any_whitespace and whitespace_pattern are for json and json_object",
            ),
        )
        for passed, message in checks:
            if not passed:
                raise RequestError(f"structured_outputs.{message}")
        size = sum(len(text.encode(errors="replace")) for text in (*self._texts, self.whitespace_pattern or ""))
        if size > MAX_BYTES:
            raise RequestError(f"structured_outputs.{given[0]} has {size} bytes; at most {MAX_BYTES} are allowed")

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def _texts(self) -> tuple[str, ...]:
        value = getattr(self, self.kind)
        return value if isinstance(value, tuple) else (value if isinstance(value, str) else "",)

    @classmethod
    def of(cls, given: Any) -> StructuredOutputsParams | None:
        """From what users and messages hold: nothing, a mapping of fields, or one of these.

        Raises: RequestError.
        """
        if given is None or isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise RequestError(f"structured_outputs must be an object with one of {', '.join(KINDS)}")
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise RequestError(f"structured_outputs.{name} is not known{hint}; it has {', '.join(known)}")
        return cls(**given)


def _is_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value != "")


def _schema_text(schema: Any) -> str:
    """In the order given: properties come in the order of the schema."""
    try:
        if isinstance(schema, Mapping):
            return json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs.json is not JSON: {error}") from None
    raise RequestError("structured_outputs.json must be a JSON schema: an object, or its text")
