"""Responses API without a server: events written from parts, bodies read as chat bodies, and pages of items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_item import ResponseItem
from pydantic import TypeAdapter

from ssd.request.output import RequestOutput, SpeculationRecord
from ssd.request.sampling_params import SamplingParams
from ssd.serving.http.bodies import read_body
from ssd.serving.http.errors import APIError
from ssd.serving.openai.answers import Chat
from ssd.serving.openai.jobs import Job
from ssd.serving.parsers.parts import Arguments, Call, Part, Reasoning, Text
from ssd.serving.responses.bodies import ResponsesBody
from ssd.serving.responses.items import ITEMS, chat_messages, input_items, listed
from ssd.serving.responses.pages import Page, page_of
from ssd.serving.responses.translation import chat_body, head
from ssd.serving.responses.writer import ResponseWriter

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
LISTED: TypeAdapter[Any] = TypeAdapter(list[ResponseItem])
CALL = Call(index=0, id="call_1", name="weather")
PARTS: dict[str, list[Part]] = {
    "nothing": [],
    "text": [Text(text="Hel"), Text(text=""), Text(text="lo")],
    "reasoning": [Reasoning(text="Let me"), Reasoning(text=" see."), Text(text="Yes")],
    "call": [CALL, Arguments(index=0, text='{"city": '), Arguments(index=0, text='"Rome"}')],
    "everything": [
        Reasoning(text="Hm"),
        Text(text="Two calls."),
        CALL,
        Arguments(index=0, text="{}"),
        Call(index=1, id="call_2", name="time"),
        Text(text="Done."),
    ],
}


def output(reason: Any = "stop") -> RequestOutput:
    return RequestOutput(
        prompt="",
        prompt_token_ids=(1, 2, 3, 4, 5),
        text="",
        token_ids=(6, 7, 8),
        finish_reason=reason,
        speculation=SpeculationRecord(),
        decode_s=0.0,
        num_cached_tokens=2,
    )


def body_of(**fields: Any) -> ResponsesBody:
    return read_body(ResponsesBody, json.dumps({"model": "tiny", "input": "x", **fields}).encode())


def chat_of(**fields: Any) -> dict[str, Any]:
    body = body_of(**fields)
    return chat_body(body, input_items(body))


def writer_of(**fields: Any) -> ResponseWriter:
    params = SamplingParams(temperature=fields.get("temperature", 1.0), top_p=fields.get("top_p", 1.0))
    job = Job(
        schema=Chat(),
        model="tiny",
        prompts=[[1]],
        choices=[(0, params)],
        stream=False,
        usage=False,
        provenance=False,
    )
    return ResponseWriter(head(body_of(**fields), job))


def checked(steps: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Events, each as the client's types demand and numbered in order."""
    events = json.loads(json.dumps([event for step in steps for event in step]))
    for event in events:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def written(parts: Sequence[Part], reason: str = "stop") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    writer = writer_of()
    steps = [writer.begin(), *map(writer.add, parts), writer.end(output(reason), reasoning_tokens=2, more={})]
    Response.model_validate(writer.response)
    return checked(steps), writer.response


def accumulated(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Output items as a client puts them together from deltas."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items) and event["item"]["status"] == "in_progress"
            items.append(event["item"])
        elif kind == "content_part.added":
            items[-1]["content"].append(event["part"])
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            assert event["item_id"] == items[-1]["id"]
            items[-1]["content"][event["content_index"]]["text"] += event["delta"]
        elif kind == "function_call_arguments.delta":
            assert event["item_id"] == items[-1]["id"]
            items[-1]["arguments"] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == items[-1]["content"][event["content_index"]]["text"]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == items[-1]["arguments"]
        elif kind == "content_part.done":
            assert event["part"] == items[-1]["content"][event["content_index"]]
        elif kind == "output_item.done":
            items[-1]["status"] = event["item"]["status"]
            assert event["item"] == items[-1]
    return items


@pytest.mark.parametrize("name", PARTS)
def test_events_add_up_to_the_response(name: str) -> None:
    events, response = written(PARTS[name])
    assert accumulated(events) == response["output"] == events[-1]["response"]["output"]
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"] and kinds[-1] == "completed"
    assert kinds.count("output_item.added") == kinds.count("output_item.done") == len(response["output"])
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"


def test_items() -> None:
    _, response = written(PARTS["everything"])
    assert [(item["type"], item["status"]) for item in response["output"]] == [
        ("reasoning", "completed"),
        ("message", "completed"),
        ("function_call", "completed"),
        ("function_call", "completed"),
        ("message", "completed"),
    ]
    call = response["output"][2]
    assert (call["call_id"], call["name"], call["arguments"]) == ("call_1", "weather", "{}")


def test_an_answer_cut_short_is_incomplete() -> None:
    events, response = written(PARTS["everything"], "length")
    assert response["status"] == "incomplete" and response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == ["completed"] * 4 + ["incomplete"]
    assert events[-1]["type"] == "response.incomplete"


def test_an_error_ends_the_response() -> None:
    writer = writer_of()
    steps = [writer.begin(), writer.add(Text(text="Hel")), writer.fail(APIError(503, "the draft is lost"))]
    last = checked(steps)[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "the draft is lost"}
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_usage() -> None:
    _, response = written(PARTS["text"])
    assert response["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 8,
    }


def test_a_response_repeats_the_request() -> None:
    tool = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    given = {
        "instructions": "Be brief",
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "previous_response_id": "resp_0",
        "store": False,
        "temperature": 0.5,
        "text": {"format": form, "verbosity": "medium"},
        "tool_choice": {"type": "function", "name": "f"},
        "tools": [tool],
        "top_p": 0.9,
        "truncation": "auto",
    }
    response = writer_of(**given).response
    Response.model_validate(response)
    assert {name: response[name] for name in given} == given


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
    {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
    },
    {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "weather", "arguments": '{"city":"Rome"}'},
    {"type": "function_call", "call_id": "call_2", "name": "time", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
    {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "noon"}]},
    {"type": "message", "role": "assistant", "content": "Rain at noon."},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "No more."}]},
    {"role": "user", "content": [{"type": "input_text", "text": "And"}, {"type": "input_text", "text": "now?"}]},
    {"type": "reasoning", "summary": [], "encrypted_content": "secret"},
    {"type": "function_call", "call_id": "call_3", "name": "time", "arguments": "{}"},
]
CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}},
    {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
    {"id": "call_3", "type": "function", "function": {"name": "time", "arguments": "{}"}},
]
TOLD = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "I look.", "reasoning_content": "Hm", "tool_calls": CALLS[:2]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
    {"role": "assistant", "content": "Rain at noon."},
    {"role": "assistant", "content": "No more."},
    {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "now?"}]},
    {"role": "assistant", "content": None, "tool_calls": CALLS[2:]},
]


def test_a_conversation_with_tools() -> None:
    instructions = {"role": "system", "content": "Be brief"}
    assert chat_of(input=HISTORY, instructions="Be brief")["messages"] == [instructions, *TOLD]


def test_listed_items_are_the_same_conversation() -> None:
    """What is kept for ``previous_response_id``."""
    rows = [listed(item) for item in ITEMS.validate_python(HISTORY)]
    LISTED.validate_python(rows)
    assert chat_messages(ITEMS.validate_json(json.dumps(rows))) == TOLD
    assert rows[1]["id"] == "rs_1" and len({row["id"] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("none", "none"),
        ("auto", "auto"),
        ("required", "required"),
        ({"type": "function", "name": "g"}, {"type": "function", "function": {"name": "g"}}),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]},
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "g"}}]},
            },
        ),
    ],
    ids=["none", "auto", "required", "named", "allowed"],
)
def test_tools(choice: Any, expected: Any) -> None:
    f = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": False}
    chat = chat_of(tools=[f, {"type": "function", "name": "g"}], tool_choice=choice, parallel_tool_calls=False)
    assert chat["tool_choice"] == expected and chat["parallel_tool_calls"] is False
    assert chat["tools"][0]["function"] == {name: value for name, value in f.items() if name != "type"}
    assert chat["tools"][1]["function"] == {"name": "g"}


def test_other_fields() -> None:
    chat = chat_of(
        max_output_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        stop=["a"],
        seed=3,
        method="none",
        text={"format": {"type": "json_object"}, "verbosity": "medium"},
        reasoning={"effort": "low", "summary": "auto"},
        stream=True,
        stream_options={"include_obfuscation": False},
        include=["reasoning.encrypted_content"],
        service_tier="auto",
        prompt_cache_key="k",
        background=False,
        conversation=None,
    )
    assert chat == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "stream": True,
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "stop": ["a"],
        "seed": 3,
        "method": "none",
        "response_format": {"type": "json_object"},
        "verbosity": "medium",
        "reasoning_effort": "low",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("background", True),
        ("conversation", "conv_1"),
        ("prompt", {"id": "p"}),
        ("context_management", [{"type": "compaction"}]),
        ("n", 2),
        ("messages", []),
        ("max_tokens", 5),
        ("logprobs", True),
        ("response_format", {"type": "json_object"}),
        ("stream_options", {"include_obfuscation": True}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_fields_that_ask_for_something_else_are_refused(name: str, value: Any) -> None:
    with pytest.raises(APIError, match=name) as refused:
        chat_of(**{name: value})
    assert (refused.value.status, refused.value.param) == (400, name)
    chat_of(**{name: None})


def test_pages() -> None:
    items = [{"id": name} for name in "abcde"]

    def ids(**query: Any) -> tuple[str, bool]:
        page = page_of(items, Page(**query))
        found = "".join(item["id"] for item in page["data"])
        assert (page["first_id"], page["last_id"]) == (found[:1], found[-1:])
        return found, page["has_more"]

    assert ids() == ("edcba", False)
    assert ids(order="asc", limit=2) == ("ab", True)
    assert ids(order="asc", limit=2, after="b") == ("cd", True)
    assert ids(limit=2, after="c") == ("ba", False)
    assert ids(after="a") == ("", False)
    with pytest.raises(APIError, match="no item 'x'"):
        ids(after="x")
