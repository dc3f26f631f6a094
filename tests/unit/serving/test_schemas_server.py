"""Schemas over HTTP: pydantic's ordinary ones, refusals with the keyword and its path, what is too large."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter

from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.testing.twins.served import Served
from tests.unit.grammars.test_pydantic_schemas import KINDS

SOME = ("set of literals", "UUID4", "Path", "SecretStr", "bytes", "discriminated", "dict pattern min", "timedelta")


@pytest.fixture(scope="module")
def served(tiny_config: Callable[..., dict[str, Any]]) -> Iterator[Served]:
    server = Served(config=tiny_config(), launch=InprocPipeline)
    yield server
    server.close()


def ask(served: Served, **fields: Any) -> tuple[int, dict[str, Any]]:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 60, "temperature": 0.9, "seed": 5, **fields}
    status, _, text = served.ask("POST", "/v1/completions", body)
    return status, json.loads(text)


def formatted(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.mark.parametrize("kind", SOME)
def test_pydantic_types(kind: str, served: Served) -> None:
    adapter = TypeAdapter(KINDS[kind])
    texts = set()
    for method in ("none", "ssd"):
        status, answer = ask(served, response_format=formatted(adapter.json_schema()), method=method)
        assert status == 200, answer
        [choice] = answer["choices"]
        texts.add(choice["text"])
        if choice["finish_reason"] == "stop":
            adapter.validate_json(choice["text"])
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"response_format": formatted({"properties": {"a": {"contains": {}}}})},
            "response_format",
            "response_format cannot be used: contains at #/properties/a cannot be held",
        ),
        (
            {"structured_outputs": {"json": {"items": {"oneOf": [{"type": "string"}, {"pattern": "a"}]}}}},
            "structured_outputs",
            "oneOf at #/items cannot be held: branches 0 and 1 may both be valid",
        ),
        (
            {"structured_outputs": {"regex": "(a{1000}){1000}"}},
            "structured_outputs",
            "structured_outputs.regex cannot be used: it is too large",
        ),
        (
            {"structured_outputs": {"regex": "a", "disable_additional_properties": True}},
            "structured_outputs",
            "structured_outputs.disable_additional_properties is for json; got regex",
        ),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs",
            "structural_tag",
        ),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "structural_tag"),
    ],
    ids=["keyword", "oneOf", "regex", "closed regex", "structural tag", "structural tag format"],
)
def test_refused(fields: dict[str, Any], param: str, message: str, served: Served) -> None:
    status, answer = ask(served, **fields)
    assert status == 400, answer
    assert answer["error"]["param"] == param and message in answer["error"]["message"]
    assert served.ask("GET", "/health")[0] == 200


def test_closed_objects(served: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    asked = {"json": schema, "disable_additional_properties": True, "disable_any_whitespace": True}
    status, answer = ask(served, structured_outputs=asked)
    assert status == 200 and json.loads(answer["choices"][0]["text"]).keys() == {"a"}
