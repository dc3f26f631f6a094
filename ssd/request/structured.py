"""Structured output: what the text of an output may look like."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from ..errors import RequestError
from . import checks

KINDS = ("json", "regex", "choice", "grammar", "json_object")
MAX_BYTES = 256 * 1024
"""Most bytes of a schema, regular expression, grammar or list of choices: they travel with the request."""
MAX_CHOICES = 2**14
NAME = "structured_outputs"


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """Exactly one of the five kinds. Names and meanings are vLLM's.

    Raises:
        RequestError: None or several kinds are given, or a value is of the wrong type or too large. Whether a schema
            or a grammar compiles is checked when the request is submitted.
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema, as a mapping or as text. Kept as text."""
    regex: str | None = None
    """The whole output matches this. Rust's ``regex`` syntax: no look-around, no back-references."""
    choice: tuple[str, ...] | None = None
    """The output is one of these texts."""
    grammar: str | None = None
    """A context-free grammar, in Lark's notation or in GBNF."""
    json_object: bool | None = None
    """Any JSON object."""
    disable_any_whitespace: bool = False
    """JSON without whitespace between its tokens."""
    whitespace_pattern: str | None = None
    """JSON whose whitespace matches this regular expression. Without it, one blank or a line break and indentation."""
    disable_additional_properties: bool = False
    """Objects whose schema does not mention additional properties have none."""

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
                f"{NAME} takes exactly one of {', '.join(KINDS)}"
                + (f", not {' and '.join(given)}" if given else "; none was given")
            )
        kind = given[0]
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            if (text := getattr(self, name)) is not None:
                self._check_text(name, text)
        if self.choice is not None:
            if not isinstance(self.choice, tuple) or not self.choice:
                raise self._refuse("choice", "a list of texts, at least one", self.choice)
            if len(self.choice) > MAX_CHOICES:
                raise RequestError(f"{NAME}.choice must have at most {MAX_CHOICES} entries; got {len(self.choice)}")
            for text in self.choice:
                self._check_text("choice", text)
        if self.json_object not in (None, True):
            raise self._refuse("json_object", "true or false", self.json_object)
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise self._refuse(name, "true or false", getattr(self, name))
        if self.disable_additional_properties and kind != "json":
            raise RequestError(f"{NAME}.disable_additional_properties is for json; got {kind}")
        if self.disable_any_whitespace and self.whitespace_pattern:
            raise RequestError(f"{NAME}.disable_any_whitespace and whitespace_pattern cannot both be given")
        if (self.disable_any_whitespace or self.whitespace_pattern) and kind not in ("json", "json_object"):
            raise RequestError(
                f"{NAME}.disable_any_whitespace and whitespace_pattern are for json and json_object; got {kind}"
            )
        size = sum(len(text.encode()) for text in (*self._texts, self.whitespace_pattern or ""))
        if size > MAX_BYTES:
            raise RequestError(f"{NAME}.{kind} must have at most {MAX_BYTES} bytes; got {size}")

    @staticmethod
    def _refuse(name: str, rule: str, value: Any) -> RequestError:
        return checks.refuse(f"{NAME}.{name}", rule, value)

    @staticmethod
    def _check_text(name: str, value: Any) -> None:
        checks.text(f"{NAME}.{name}", value)

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def _texts(self) -> tuple[str, ...]:
        value = getattr(self, self.kind)
        return value if isinstance(value, tuple) else (value if isinstance(value, str) else "",)

    @classmethod
    def of(cls, given: Any) -> StructuredOutputsParams | None:
        """Returns the value of a mapping of fields. None and values of this class are returned as they are.

        Raises: RequestError: A field is unknown or wrong.
        """
        if given is None or isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise checks.refuse(NAME, f"an object with one of {', '.join(KINDS)}", given)
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                told = name if isinstance(name, str) and name.isidentifier() else checks.shown(name)
                raise RequestError(f"{NAME}.{told} is not known{hint}; it has {', '.join(known)}")
        return cls(**given)


def _schema_text(schema: Any) -> str:
    """Returns a schema as JSON text. Keys keep their order: it is the order of properties in the output."""
    try:
        if isinstance(schema, Mapping):
            return json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{NAME}.json is not JSON: {' '.join(str(error).split())}") from None
    raise checks.refuse(f"{NAME}.json", "a JSON schema: an object, or its text", schema)
