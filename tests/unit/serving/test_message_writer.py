"""Messages API without a server: events written from parts, and bodies read as chat bodies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from ssd.request.output import RequestOutput, SpeculationRecord
from ssd.serving.anthropic.bodies import CountBody, MessagesBody
from ssd.serving.anthropic.translation import chat_body
from ssd.serving.anthropic.writer import BROKEN, MessageWriter
from ssd.serving.http.bodies import read_body
from ssd.serving.http.errors import APIError
from ssd.serving.parsers.parts import Arguments, Call, Part, Reasoning, Text

EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
THOUGHT = Reasoning(text="Let me see.")
CALL = Call(index=0, id="call_1", name="weather")
PARTS: dict[str, list[Part]] = {
    "nothing": [],
    "text": [Text(text="Hel"), Text(text=""), Text(text="lo")],
    "reasoning": [THOUGHT, Reasoning(text=" Hm."), Text(text="Yes")],
    "call": [CALL, Arguments(index=0, text='{"city": '), Arguments(index=0, text='"Rome"}')],
    "everything": [
        THOUGHT,
        Text(text="Two calls."),
        CALL,
        Arguments(index=0, text="{}"),
        Call(index=1, id="call_2", name="time"),
        Text(text="Done."),
    ],
}


def output(reason: Any = "stop", stop_reason: str | int | None = None) -> RequestOutput:
    return RequestOutput(
        prompt="",
        prompt_token_ids=(1, 2, 3, 4, 5),
        text="",
        token_ids=(6, 7, 8),
        finish_reason=reason,
        stop_reason=stop_reason,
        speculation=SpeculationRecord(),
        decode_s=0.0,
        num_cached_tokens=2,
    )


def written(parts: Sequence[Part], finish: str = "stop", **ended: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Events and message; each is checked against the client's types."""
    writer = MessageWriter(name="msg_1", model="tiny", input_tokens=5, stop_sequences=["END"])
    steps = [writer.begin(), *map(writer.add, parts), writer.end(output(**ended), finish, thinking_tokens=0, more={})]
    events = json.loads(json.dumps([event for step in steps for event in step]))
    for event in events:
        if event["type"] != "ping":
            EVENTS.validate_python(event)
    Message.model_validate(writer.message)
    return events, writer.message


def accumulated(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content of a message as a client puts it together."""
    content: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(content)
            content.append(event["content_block"])
            texts = []
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(content) - 1
            texts.append(next(value for key, value in event["delta"].items() if key != "type"))
        elif event["type"] == "content_block_stop":
            block, text = content[-1], "".join(texts)
            if block["type"] == "tool_use":
                block["input"] = json.loads(text) if text else {}
            else:
                block["thinking" if block["type"] == "thinking" else "text"] = text
    return content


@pytest.mark.parametrize("name", PARTS)
def test_events_add_up_to_the_message(name: str) -> None:
    events, message = written(PARTS[name])
    assert accumulated(events) == message["content"]
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "ping"] and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(message["content"])


def test_blocks() -> None:
    _, message = written(PARTS["everything"])
    assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use", "tool_use", "text"]
    assert message["content"][2] == {"type": "tool_use", "id": "call_1", "name": "weather", "input": {}}


@pytest.mark.parametrize(
    ("reason", "ended", "stop_reason", "sequence"),
    [
        ("stop", {}, "end_turn", None),
        ("length", {"reason": "length"}, "max_tokens", None),
        ("stop", {"stop_reason": "END"}, "stop_sequence", "END"),
        ("stop", {"stop_reason": "</s>"}, "end_turn", None),
        ("stop", {"stop_reason": 2}, "end_turn", None),
        ("tool_calls", {}, "tool_use", None),
        ("tool_calls", {"stop_reason": "END"}, "tool_use", None),
    ],
    ids=["end", "length", "sequence", "another string", "token", "tool", "tool and sequence"],
)
def test_stop_reasons(reason: str, ended: dict[str, Any], stop_reason: str, sequence: str | None) -> None:
    events, message = written(PARTS["text"], reason, **ended)
    assert (message["stop_reason"], message["stop_sequence"]) == (stop_reason, sequence)
    assert events[-2]["delta"] == {"stop_reason": stop_reason, "stop_sequence": sequence}


def test_usage() -> None:
    events, message = written(PARTS["text"])
    usage = {"input_tokens": 3, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2, "output_tokens": 3}
    assert message["usage"] == events[-2]["usage"] == usage
    at_first = {"input_tokens": 5, "cache_read_input_tokens": 0, "output_tokens": 0}
    assert events[0]["message"]["usage"] == {**usage, **at_first}


@pytest.mark.parametrize("text", ['{"city": "Ro', "[1]", "nonsense", "[" * 100_000], ids=lambda text: text[:10])
def test_input_that_is_not_an_object(text: str) -> None:
    _, message = written([CALL, Arguments(index=0, text=text)], "length")
    assert message["content"][0]["input"] == {BROKEN: text}


def chat_of(**fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}], **fields}
    return chat_body(read_body(MessagesBody, json.dumps(body).encode()), "/v1/messages")


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said, "cache_control": {"type": "ephemeral"}}


def test_a_conversation_with_tools() -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Zürich"}}
    chat = chat_of(
        system=[text("Be"), text("brief")],
        messages=[
            {"role": "user", "content": [text("Weather?")]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    text("I look."),
                    use,
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("rain")], "is_error": False},
                    {"type": "tool_result", "tool_use_id": "toolu_2"},
                    text("And?"),
                ],
            },
        ],
    )
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]
    function = {"name": "weather", "arguments": '{"city": "Zürich"}'}
    assert chat["messages"] == [
        {"role": "system", "content": parts},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm",
            "tool_calls": [{"id": "toolu_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": ""},
        {"role": "user", "content": "And?"},
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        (
            {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}, "parallel_tool_calls": False},
        ),
    ],
    ids=["auto", "any", "none", "tool"],
)
def test_tools(given: dict[str, Any], expected: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [
        {"name": "weather", "description": "d", "input_schema": schema, "strict": True, "cache_control": None},
        {"type": "custom", "name": "time", "input_schema": {"type": "object"}},
    ]
    chat = chat_of(tools=tools, tool_choice=given)
    assert chat.items() >= expected.items()
    assert [tool["function"] for tool in chat["tools"]] == [
        {"name": "weather", "description": "d", "parameters": schema, "strict": True},
        {"name": "time", "parameters": {"type": "object"}},
    ]


@pytest.mark.parametrize(
    ("thinking", "switch"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "adaptive"}, True),
        ({"type": "disabled"}, False),
    ],
    ids=["enabled", "adaptive", "disabled"],
)
def test_thinking_is_a_variable_of_the_template(thinking: dict[str, Any], switch: bool) -> None:
    assert chat_of(thinking=thinking)["chat_template_kwargs"] == {"enable_thinking": switch}
    mixed = chat_of(thinking=thinking, chat_template_kwargs={"more": 1})
    assert mixed["chat_template_kwargs"] == {"enable_thinking": switch, "more": 1}
    assert "chat_template_kwargs" not in chat_of()


def test_other_fields() -> None:
    chat = chat_of(
        stop_sequences=["a"],
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        seed=3,
        method="none",
        metadata={"user_id": "me"},
        service_tier="auto",
        container=None,
        mcp_servers=[],
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    )
    assert chat == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 9,
        "stream": False,
        "stop": ["a"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "seed": 3,
        "method": "none",
        "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "output", "schema": {"type": "object"}}},
    }


def test_the_last_message_of_the_assistant_is_continued() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "{"}]
    chat = chat_of(messages=messages)
    assert chat["messages"] == messages
    assert (chat["add_generation_prompt"], chat["continue_final_message"]) == (False, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("container", "c1"),
        ("context_management", {"edits": [{"type": "clear_tool_uses_20250919"}]}),
        ("mcp_servers", [{"url": "x"}]),
        ("speed", "fast"),
        ("n", 2),
        ("n", True),
        ("stop", ["x"]),
        ("logprobs", True),
        ("response_format", {"type": "json_object"}),
        ("max_completion_tokens", 5),
    ],
    ids=lambda value: str(value)[:30],
)
def test_fields_that_ask_for_something_else_are_refused(name: str, value: Any) -> None:
    with pytest.raises(APIError, match=name) as refused:
        chat_of(**{name: value})
    assert (refused.value.status, refused.value.param) == (400, name)
    chat_of(**{name: None})


def test_count_tokens_needs_no_length() -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    assert "max_tokens" not in chat_body(read_body(CountBody, json.dumps(body).encode()), "/v1/messages/count_tokens")
