"""Messages as clients keep them: every history that says the same gives the same prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage

from ssd.serving.http.errors import APIError
from ssd.serving.openai.bodies import ChatBody, read_body
from ssd.serving.openai.jobs import JobReader
from ssd.testing.twins.served import Served

USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.close()


def for_template(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    body: Any = read_body(ChatBody, {"messages": list(messages)})[0]
    return [message.for_template() for message in body.messages]


def prompt_of(served: Served, *messages: dict[str, Any]) -> str:
    job = JobReader(served.engine, model="tiny").chat({"messages": list(messages)})
    return served.engine.tokenizer.decode(job.prompts[0])


@pytest.mark.parametrize(
    "given",
    [
        {"refusal": None},
        {"annotations": []},
        {"annotations": None, "audio": None, "function_call": None, "tool_calls": None},
        {"tool_calls": []},
        {"name": None},
        {"id": "msg_1", "timestamp": 1790000000, "type": "message", "object": "x", "opts": {"a": [1]}},
        {"content": [{"type": "text", "text": "hi there"}]},
        {"content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "there", "cache_control": {"a": 1}}]},
        {"content": ["hi ", "there"]},
        {"content": [{"text": "hi there"}]},
        {"content": [{"type": "output_text", "text": "hi there", "annotations": []}]},
        {"content": [{"type": "refusal", "refusal": "hi there"}]},
        {"content": None, "refusal": "hi there"},
    ],
    ids=lambda given: ascii(given)[:60],
)
def test_what_says_nothing_changes_nothing(served: Served, given: dict[str, Any]) -> None:
    plain = [USER, {"role": "assistant", "content": "hi there"}, USER]
    varied = [USER, {"role": "assistant", "content": "hi there", **given}, USER]
    assert prompt_of(served, *varied) == prompt_of(served, *plain)


@pytest.mark.parametrize("empty", [{"content": None}, {}, {"content": ""}, {"content": []}], ids=str)
@pytest.mark.parametrize("role", ["assistant", "tool"])
def test_empty_content_is_empty_text(role: str, empty: dict[str, Any]) -> None:
    [_, said] = for_template(USER, {"role": role, **empty})
    assert not said["content"] and said["content"] is not None


def test_the_clients_own_message_is_a_history(served: Served) -> None:
    """``model_dump()`` writes every field of OpenAI's type, null or not."""
    client = served.client()
    first = client.chat.completions.create(model="tiny", messages=[USER], max_tokens=6, seed=1)
    message = first.choices[0].message
    histories = [message, message.model_dump(), message.model_dump(exclude_none=True), json.loads(message.to_json())]
    answers = [
        client.chat.completions.create(model="tiny", messages=[USER, said, USER], max_tokens=6, seed=1)
        for said in histories
    ]
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert len({answer.usage.prompt_tokens for answer in answers}) == 1
    assert {"refusal", "annotations", "audio", "function_call", "tool_calls"} <= message.model_dump().keys()


CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}}


def test_tool_calls_and_their_results_reach_the_template() -> None:
    asked = ChatCompletionMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [CALL]})
    result = {"role": "tool", "tool_call_id": "call_1", "name": "add", "content": [{"type": "text", "text": "3"}]}
    [_, call, seen] = for_template(USER, asked.model_dump(), result)
    assert call == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
        ],
    }
    assert seen == {
        "role": "tool",
        "content": [{"type": "text", "text": "3"}],
        "name": "add",
        "tool_call_id": "call_1",
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ("{}", {}),
        ("", {}),
        (None, {}),
        ('{"a": ', '{"a": '),
        ("not JSON", "not JSON"),
        ("[1]", "[1]"),
        ("null", "null"),
        ('{"a": NaN}', '{"a": NaN}'),
        (r'{"a": "\ud800"}', r'{"a": "\ud800"}'),
        ('{"a": 1e999}', '{"a": 1e999}'),
        ('{"a":' * 5000 + "1" + "}" * 5000, '{"a":' * 5000 + "1" + "}" * 5000),
        ('{"a": ' + "9" * 5000 + "}", '{"a": ' + "9" * 5000 + "}"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_arguments_are_mappings_where_they_are_json(arguments: Any, expected: Any) -> None:
    """A model may have written anything. Templates see it as it is, and no history is refused for it."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    [_, said] = for_template(USER, {"role": "assistant", "content": None, "tool_calls": [call]})
    assert said["tool_calls"][0]["function"]["arguments"] == expected


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_of_past_turns_reaches_the_template(field: str) -> None:
    [said] = for_template({"role": "assistant", "content": "4", field: "2 + 2"})
    assert said == {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}


def test_names_and_developers() -> None:
    seen = for_template({"role": "developer", "content": "be brief"}, {**USER, "name": "ada"})
    assert seen == [{"role": "system", "content": "be brief"}, {**USER, "name": "ada"}]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "user"}, "messages.0: content is missing"),
        ({"role": "user", "content": None}, "messages.0: content is missing"),
        ({"role": "system", "content": []}, "messages.0: content is missing"),
        ({"role": "bob", "content": "x"}, "messages.0.role"),
        ({"content": "x"}, "messages.0.role"),
        ({"role": "function", "name": "f", "content": "x"}, "use tool_calls and 'tool'"),
        ({"role": "assistant", "content": None, "function_call": {"name": "f"}}, "use tool_calls and 'tool'"),
        ({"role": "assistant", "content": None, "audio": {"id": "x"}}, "audio is not supported"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "images are not supported"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_image"}]}, "part 1: images"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "audio are not supported"),
        ({"role": "user", "content": [{"type": "file", "file": {}}]}, "files are not supported"),
        ({"role": "user", "content": [{"type": "video_url", "video_url": {}}]}, "videos are not supported"),
        ({"role": "user", "content": [{"type": "zebra"}]}, "messages.0.content.0.type: Input should be 'text'"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0.text: Field required"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "messages.0.content.0.text"),
        ({"role": "user", "content": [{"type": {}}]}, "messages.0.content.0.type"),
        ({"role": "user", "content": [None]}, "messages.0.content.0"),
        ({"role": "user", "content": {"type": "text", "text": "x"}}, "messages.0.content"),
        ({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}, "tool_calls.0.type"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "tool_calls.0.function.name"),
        ({"role": "assistant", "tool_calls": "x"}, "messages.0.tool_calls"),
        ("x", "messages.0"),
        (None, "messages.0"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_wrong_messages_are_named(message: Any, said: str) -> None:
    with pytest.raises(APIError) as refused:
        for_template(message)
    assert (refused.value.status, refused.value.param) == (400, "messages")
    assert said in refused.value.message
