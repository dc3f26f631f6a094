"""Answers that a limit or a stop string ends in the middle of a marker or a call."""

from __future__ import annotations

import json

import pytest

from ssd.serving.parsers.formats import CALL_FORMATS, REASONING_FORMATS, AnswerFormat, Tool
from ssd.serving.parsers.parts import Answer

TOOLS = (Tool(name="add", schema={"type": "object", "properties": {"a": {"type": "string"}}}),)
CALL = '{"name": "add", "arguments": {"a": "1"}}'
CALLS = {
    "hermes": f"<tool_call>\n{CALL}\n</tool_call>",
    "qwen3_xml": "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "llama3_json": "<|python_tag|>" + CALL.replace("arguments", "parameters"),
    "mistral": f"[TOOL_CALLS][{CALL}, {CALL}]",
    "mistral, named": '[TOOL_CALLS]add[ARGS]{"a": "1"}',
    "gpt_oss": '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": "1"}<|call|>',
}


def read(calls: str, reasoning: str, text: str, *, cut: bool, tokens: bool = False, size: int = 1000) -> Answer:
    markers = {*CALL_FORMATS.get(calls, ()), *REASONING_FORMATS.get(reasoning, ())}
    ids = {marker: index for index, marker in enumerate(sorted(markers))} if tokens else {}
    format = AnswerFormat(calls=calls, reasoning=reasoning, tokens=ids, hidden=(), special=False)
    parser = format.parser("", tools=TOOLS)(lambda index: f"{index}" * 64)
    parts = [part for at in range(0, len(text), size) for part in parser.feed(text[at : at + size])]
    return Answer.of([*parts, *parser.finish(cut=cut)])


@pytest.mark.parametrize("name", CALLS)
def test_no_piece_of_a_marker_or_a_call_is_text(name: str) -> None:
    """Wherever the answer is cut, the text is what the model said before the call."""
    calls = name.partition(",")[0]
    said = "" if calls == "gpt_oss" else "I look."
    for length in range(len(CALLS[name]) + 1):
        answer = read(calls, "none", said + CALLS[name][:length], cut=True)
        assert answer.text == said
        assert answer == read(calls, "none", said + CALLS[name][:length], cut=True, size=1)
        for call in answer.calls:
            assert call.name == "add" and '{"a": "1"}'.startswith(call.arguments)


def test_a_call_at_the_beginning_of_the_answer() -> None:
    whole = CALL.replace("arguments", "parameters")
    for length in range(len(whole)):
        assert read("llama3_json", "none", whole[:length], cut=True).text == ""


@pytest.mark.parametrize("reasoning", ["think", "deepseek_r1", "mistral"])
def test_no_piece_of_a_marker_is_reasoning(reasoning: str) -> None:
    opening, closing = REASONING_FORMATS[reasoning]
    for length in range(1, len(closing) + 1):
        for size in (1, 1000):
            answer = read("none", reasoning, f"{opening}so{closing[:length]}", cut=True, size=size)
            assert (answer.reasoning, answer.text) == ("so", "")
    for length in range(1, len(opening)):
        answer = read("none", reasoning, opening[:length], cut=True)
        assert (answer.reasoning, answer.text) == ("", "")


@pytest.mark.parametrize("name", CALLS)
def test_what_the_model_ended_is_text(name: str) -> None:
    """Nothing is lost of an answer that the model ended itself."""
    if name.startswith("gpt_oss"):
        pytest.skip("headers of messages are no text")
    opening = CALLS[name][:5]
    assert read(name.partition(",")[0], "none", f"a {opening}", cut=False).text == f"a {opening}"


def test_the_beginning_of_a_token_is_text() -> None:
    """A marker that is a token comes whole, so what looks like its beginning is the model's text."""
    assert read("hermes", "think", "<think>a</think>if b <", cut=True, tokens=True).text == "if b <"
    assert read("hermes", "think", "<think>a <", cut=True, tokens=True).reasoning == "a <"
    assert read("hermes", "none", '<tool_call>{"name": "ad', cut=True, tokens=True).text == ""


def test_text_after_a_call_that_was_no_call_stays() -> None:
    odd = '<tool_call>{"name": 5}</tool_call> and more'
    assert read("hermes", "none", odd, cut=True).text == odd
    assert json.loads(read("hermes", "none", f"{odd}<tool_call>{CALL}", cut=True).calls[0].arguments) == {"a": "1"}
