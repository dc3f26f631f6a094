"""``response_format`` and ``structured_outputs`` over HTTP, with OpenAI's own client and real workers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.testing.twins.served import Served

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


def named(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


@pytest.fixture(scope="module")
def served(tiny_config: Callable[..., dict[str, Any]]) -> Iterator[Served]:
    server = Served(config=tiny_config(), launch=InprocPipeline)
    yield server
    server.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema(served: Served, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": "size: ",
        "max_tokens": 60,
        "seed": 3,
        "response_format": named(SCHEMA, strict=True, description="what to say"),
    }
    texts = []
    for method in ("none", "ssd"):
        body = {**asked, "stream": stream, "method": method}
        extra = {name: body.pop(name) for name in ("response_format", "method")}
        answer = served.client().completions.create(**body, extra_body=extra)
        parts = [choice for one in (answer if stream else [answer]) for choice in one.choices]
        assert parts[-1].finish_reason == "stop"
        texts.append("".join(part.text for part in parts))
        value = json.loads(texts[-1])
        assert list(value) == ["ok", "n"] and isinstance(value["ok"], bool) and 0 <= value["n"] <= 99
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "[a-f]{4}-[0-9]{2}"}, "[a-f]{4}-[0-9]{2}"),
        ({"choice": ["red", "green"]}, "red|green"),
        ({"grammar": 'root ::= "x" | "(" root ")"'}, r"\(*x\)*"),
        ({"json": {"enum": [1, 22, None]}}, "1|22|null"),
        ({"json_object": True, "disable_any_whitespace": True}, r"\{.*\}"),
    ],
    ids=str,
)
def test_structured_outputs(served: Served, wanted: dict[str, Any], pattern: str) -> None:
    answer = served.client().completions.create(
        model="tiny", prompt="colour: ", max_tokens=40, seed=5, extra_body={"structured_outputs": wanted}
    )
    [choice] = answer.choices
    if choice.finish_reason == "stop":
        assert re.fullmatch(pattern, choice.text, re.DOTALL)
    else:  # nothing of it forces this one to an end
        assert "json_object" in wanted or "grammar" in wanted


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json"}}, "response_format", "json_object"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format", "schema"),
        ({"response_format": named({"type": "objekt"})}, "response_format", "objekt"),
        ({"response_format": named(SCHEMA, strictly=True)}, "response_format", "strictly"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs", "regexp"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "not both",
        ),
        ({"guided_json": SCHEMA}, "guided_json", "structured_outputs.json"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(served: Served, fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        served.client().completions.create(model="tiny", prompt="x", max_tokens=2, extra_body=fields)
    assert caught.value.param == param
    assert "\n" not in str(caught.value.body["message"])  # type: ignore[index]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_request_says_so(served: Served, stream: bool) -> None:
    fields = {"structured_outputs": {"regex": "aaaax"}, "bad_words": ["x"]}
    with pytest.raises(openai.APIError, match="no token can follow"):
        answer = served.client().completions.create(
            model="tiny", prompt="x", max_tokens=20, stream=stream, extra_body=fields
        )
        list(answer)
    assert served.ask("GET", "/health")[0] == 200
