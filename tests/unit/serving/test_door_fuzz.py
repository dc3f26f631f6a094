"""Damaged bodies for the Responses and Messages APIs: an answer, or an error of one line in the door's shape."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd.serving.anthropic.bodies import MessagesBody
from ssd.serving.http.bodies import read_fields
from ssd.serving.http.errors import APIError
from ssd.serving.responses.bodies import ResponsesBody
from ssd.testing.twins.served import Served

TOOL = {"name": "f", "description": "d", "strict": False}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/responses": {
        "model": "tiny",
        "input": [
            {"role": "developer", "content": "x"},
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "x"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "x"}]},
        ],
        "instructions": "x",
        "max_output_tokens": 2,
        "metadata": {"a": "b"},
        "temperature": 1.0,
        "top_p": 0.9,
        "tools": [{"type": "function", **TOOL, "parameters": SCHEMA}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
        "parallel_tool_calls": True,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "truncation": "auto",
        "store": False,
        "stream": False,
        "seed": 1,
    },
    "/v1/messages": {
        "model": "tiny",
        "max_tokens": 2,
        "system": [{"type": "text", "text": "x"}],
        "messages": [
            {"role": "user", "content": "x"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "x", "signature": "s"},
                    {"type": "text", "text": "x"},
                    {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "x"}]},
                    {"type": "text", "text": "x"},
                ],
            },
        ],
        "stop_sequences": ["@"],
        "temperature": 1.0,
        "top_k": 5,
        "tools": [{**TOOL, "input_schema": SCHEMA}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": False},
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "output_config": {"effort": "low"},
        "metadata": {"user_id": "x"},
        "stream": False,
        "seed": 1,
    },
}
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    1e39,
    10**30,
    "",
    "x",
    "a\ud800b",
    "\x00",
    "line\nbreak",
    [],
    [[]],
    [None],
    {},
    {"type": "image"},
    {"type": None},
    {"\n": {}},
    [{} for _ in range(20)],
    "y" * 2000,
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served(round_s=0.0)
    yield server
    server.close()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place within a body."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in ((*path, key), *places(item, (*path, key)))]


@st.composite
def damaged(draw: Any, path: str) -> dict[str, Any]:
    body = copy.deepcopy(BODIES[path])
    for _ in range(draw(st.integers(1, 3))):
        found = places(body)
        *way, last = draw(st.sampled_from(found))
        holder: Any = body
        for key in way:
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "remove", "add"]))
        if kind == "remove":
            del holder[last]
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["type", "text", "content", "role", "odd", "name", "n"]))] = draw(
                st.sampled_from(JUNK).map(copy.deepcopy)
            )
        else:
            holder[last] = draw(st.sampled_from(JUNK).map(copy.deepcopy))
        if not body:
            break
    return body


def check(served: Served, path: str, body: dict[str, Any]) -> None:
    status, _, text = served.ask("POST", path, body)
    answer = json.loads(text) if not text.startswith("event:") else {}
    if status == 200:
        assert "error" not in answer or answer["error"] is None
        return
    assert 400 <= status < 500, text
    keys = {"type", "error", "request_id"} if path.startswith("/v1/messages") else {"error"}
    message = answer["error"]["message"]
    assert set(answer) == keys and message and "\n" not in message and len(message) <= 1000


@pytest.mark.parametrize("path", BODIES)
def test_the_bodies_are_valid(served: Served, path: str) -> None:
    status, _, text = served.ask("POST", path, BODIES[path])
    assert status == 200, text


@pytest.mark.parametrize("path", BODIES)
@settings(max_examples=250)
@given(data=st.data())
def test_damaged_bodies(served: Served, path: str, data: st.DataObject) -> None:
    check(served, path, data.draw(damaged(path)))


def test_damaged_bodies_are_counted(served: Served) -> None:
    @settings(max_examples=100)
    @given(damaged("/v1/messages"))
    def counted(body: dict[str, Any]) -> None:
        check(served, "/v1/messages/count_tokens", body)

    counted()


@pytest.mark.parametrize("item", [5, {"role": "user", "content": [5]}, {"role": "user", "content": "x"}], ids=str)
@pytest.mark.parametrize("path", BODIES)
def test_long_lists_are_refused_at_once(path: str, item: Any) -> None:
    """Every wrong item would be an error of its own: seconds, in which no other request is answered."""
    field, cls = ("input", ResponsesBody) if path == "/v1/responses" else ("messages", MessagesBody)
    count = 2**20 // len(json.dumps(item))
    raw = json.dumps({"model": "tiny", "max_tokens": 2, field: [item] * count}).encode()
    given = json.loads(raw)
    began = time.process_time()
    with pytest.raises(APIError, match=field):
        read_fields(cls, given)
    assert time.process_time() - began < 1


def test_no_request_is_left(served: Served) -> None:
    """After all the tests above."""
    served.until(lambda: served.engine.running == served.engine.queued == served.engine.tokens_in_flight == 0)
