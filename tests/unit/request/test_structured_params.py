"""Structured output as users ask for it: checked fields, messages, and grammars that cannot be compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ssd import RequestError, SamplingParams, StructuredOutputsParams
from ssd.errors import PipelineError
from ssd.grammars.compiler import Grammars
from ssd.pipeline.transport.messages import Submit, decode, encode
from ssd.request.structured import MAX_BYTES
from ssd.serving.lane import wire
from ssd.testing.models.tiny import tiny_tokenizer

SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"type": "string"}}, "required": ["z", "a"]}
GOOD: tuple[dict[str, Any], ...] = (
    {"json": SCHEMA},
    {"json": '{"type": "integer"}'},
    {"json": "true"},
    {"regex": r"[a-z]+@\d{2}"},
    {"choice": ["yes", "no", "é日"]},
    {"grammar": 'root ::= "a" | "(" root ")"'},
    {"grammar": 'start: "a" | "(" start ")"'},
    {"json_object": True, "disable_any_whitespace": True},
    {"json": SCHEMA, "whitespace_pattern": " ?"},
)
WRONG: tuple[tuple[Any, str], ...] = (
    ({}, "exactly one of"),
    ({"json_object": False}, "exactly one of"),
    ({"json": SCHEMA, "regex": "a"}, "not json and regex"),
    ("a+", "must be an object"),
    ({"regexp": "a"}, "did you mean 'regex'"),
    ({"regex": ""}, "regex must be"),
    ({"regex": 5}, "regex must be"),
    ({"json": [1]}, "json must be"),
    ({"json": True}, "json must be"),
    ({"json": {"const": {1, 2}}}, "is not JSON"),
    ({"choice": "yes"}, "choice must be"),
    ({"choice": []}, "choice must be"),
    ({"choice": ["a", ""]}, "choice must be"),
    ({"choice": ["a", 5]}, "choice must be"),
    ({"json_object": 1.5}, "json_object must be"),
    ({"regex": "a", "disable_any_whitespace": True}, "are for json"),
    ({"json_object": True, "disable_any_whitespace": True, "whitespace_pattern": " "}, "cannot both"),
    ({"regex": "a" * (MAX_BYTES + 1)}, "bytes"),
    ({"choice": ["é" * (MAX_BYTES // 2), "é"]}, "bytes"),
)
REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"regex": "(a"}, "unclosed group"),
    ({"regex": r"(a)\1"}, "backreferences"),
    ({"regex": r"[^\s\S]"}, "no text matches"),
    ({"json": "{"}, "Expecting"),
    ({"json": {"type": "objekt"}}, "objekt"),
    ({"json": {"$ref": "http://example.com/schema"}}, "does not fetch"),
    ({"json": {"not": {"pattern": "a"}}}, "not at # cannot be held"),
    ({"json": "false"}, "nsatisfiable"),
    ({"json_object": True, "whitespace_pattern": "("}, "unclosed group"),
    ({"grammar": "start: nothing"}, "unknown name"),
    ({"grammar": "x ::= ::="}, "Expected"),
)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(lambda: tiny_tokenizer(400), vocabulary=400, ends=[0])


@pytest.mark.parametrize("given", GOOD, ids=str)
def test_good_ones_cross_the_lanes(given: dict[str, Any], grammars: Grammars) -> None:
    params = SamplingParams(structured_outputs=given)  # type: ignore[arg-type]
    assert params.structured_outputs == StructuredOutputsParams(**given)
    assert params.processed
    sent = Submit(request=1, prompt=[5, 6], params=params)
    assert decode(encode(sent)) == sent
    asked = wire.Ask(number=1, prompt="x", params=params, credit=3)
    assert wire.decode(wire.encode(asked), wire.FromClient) == asked
    assert params.structured_outputs is not None
    assert not grammars.matcher(params.structured_outputs).complete


@pytest.mark.parametrize(("given", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_ones_are_named(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams(structured_outputs=given)
    assert str(caught.value).startswith("structured_outputs")


def test_a_schema_keeps_its_order() -> None:
    wanted = StructuredOutputsParams(json=SCHEMA)
    assert isinstance(wanted.json, str) and wanted.json.index('"z"') < wanted.json.index('"a"')


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=str)
def test_what_cannot_be_compiled_is_refused_in_one_line(
    given: dict[str, Any], message: str, grammars: Grammars
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        grammars.matcher(StructuredOutputsParams(**given))
    kind = next(iter(given))
    assert str(caught.value).startswith(f"structured_outputs.{kind} cannot be used: ")
    assert "\n" not in str(caught.value) and "<state>" not in str(caught.value)


def test_messages_with_nonsense_are_no_messages() -> None:
    raw = encode(Submit(request=1, prompt=[5], params=SamplingParams(structured_outputs={"regex": "a"})))  # type: ignore[arg-type]
    with pytest.raises(PipelineError):
        decode(raw.replace(b"regex", b"regez"))


def test_a_grammar_is_compiled_once(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    import llguidance

    made: list[str] = []
    real = llguidance.LLMatcher

    class Counting:
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            made.append(args[1])
            return real(*args, **kwargs)

        grammar_from_regex = real.grammar_from_regex

    monkeypatch.setattr(llguidance, "LLMatcher", Counting)
    one, other = (grammars.matcher(StructuredOutputsParams(regex="[abc]+once")) for _ in range(2))
    assert len(made) == 1
    token = tiny_tokenizer(400).encode("a")[0]
    assert one.advance(token)
    assert one.allowed([()])[0, 0] == other.allowed([()])[0, 0] == False  # noqa: E712
    assert other.advance(token)  # the first one's advance was its own


def test_replacing_other_fields_keeps_it() -> None:
    params = SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
    assert replace(params, seed=4).structured_outputs == params.structured_outputs
