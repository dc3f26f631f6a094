"""Structured output in request bodies: OpenAI's ``response_format`` and vLLM's ``structured_outputs``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..http.errors import APIError

REPLACED = {
    f"guided_{kind}": f"structured_outputs.{kind}"
    for kind in ("json", "regex", "choice", "grammar", "whitespace_pattern")
}
"""vLLM's names before 0.12, and their replacements."""


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class _Schema(_Fields):
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """Without effect: the output always follows the schema."""


class _Text(_Fields):
    type: Literal["text"]


class _Object(_Fields):
    type: Literal["json_object"]


class _JsonSchema(_Fields):
    type: Literal["json_schema"]
    json_schema: _Schema


ResponseFormat = Annotated[_Text | _Object | _JsonSchema, Field(discriminator="type")]


class StructuredOutputs(_Fields):
    """Fields of ``ssd.StructuredOutputsParams``, which checks them."""

    json_: Annotated[str | dict[str, Any] | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    disable_additional_properties: bool = False


def structured_outputs(wanted: StructuredOutputs | None, format: Any) -> dict[str, Any] | None:
    """Returns fields of ``StructuredOutputsParams``, or None if the output is free.

    Raises:
        APIError: 400: both fields ask for something.
    """
    asked = None if format is None or isinstance(format, _Text) else format
    if wanted is None:
        if asked is None:
            return None
        return {"json_object": True} if isinstance(asked, _Object) else {"json": asked.json_schema.schema_}
    if asked is not None:
        raise APIError(
            400,
            "give response_format or structured_outputs, not both",
            param="structured_outputs",
            code="invalid_value",
        )
    return wanted.model_dump(by_alias=True, exclude_unset=True)
