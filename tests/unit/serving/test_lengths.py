"""How long answers may be: defaults end where the context ends, and what was asked for is granted or named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ssd.testing.twins.served import Served

CONTEXT = 64
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HEADER = "x-ssd-max-tokens"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served(f"engine.max_model_len={CONTEXT}")
    yield server
    server.close()


@pytest.fixture(scope="module")
def cutting() -> Iterator[Served]:
    server = Served(f"engine.max_model_len={CONTEXT}", "server.long_requests=cut")
    yield server
    server.close()


def ask(server: Served, body: dict[str, Any], path: str = TEXT) -> tuple[int, dict[str, str], dict[str, Any]]:
    status, headers, text = server.ask("POST", path, {"model": "tiny", "seed": 1, **body})
    return status, headers, json.loads(text)


@pytest.mark.parametrize(("length", "expected"), [(63, 1), (60, 4), (48, 16), (47, 16), (1, 16)])
def test_the_default_is_cut_to_the_room(served: Served, length: int, expected: int) -> None:
    status, headers, answer = ask(served, {"prompt": [5] * length})
    assert status == 200 and HEADER not in headers
    assert answer["usage"]["completion_tokens"] == expected
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("server", ["served", "cutting"])
@pytest.mark.parametrize("asked", [{}, {"max_tokens": 1}, {"max_tokens": 1000}], ids=str)
@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1, 100])
def test_a_prompt_without_room_is_named(
    server: str, asked: dict[str, int], length: int, request: pytest.FixtureRequest
) -> None:
    target: Served = request.getfixturevalue(server)
    status, _, answer = ask(target, {"prompt": [5] * length, **asked})
    error = answer["error"]
    assert (status, error["param"], error["code"]) == (400, "prompt", "context_length_exceeded")
    assert f"has {length} tokens" in error["message"] and "at most 63" in error["message"]
    long = [{"role": "user", "content": "a b " * length}]
    status, _, answer = ask(target, {"messages": long, **asked}, CHAT)
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert answer["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("asked", [5, 100, 2**31, 2**62])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_than_the_room_is_refused_by_default(served: Served, field: str, asked: int) -> None:
    status, _, answer = ask(served, {"prompt": [5] * 60, field: asked})
    error = answer["error"]
    assert (status, error["param"], error["code"]) == (400, field, "context_length_exceeded")
    assert f"{field} is {asked}" in error["message"] and "room for 4" in error["message"]
    assert "60 tokens" in error["message"] and "64" in error["message"]
    assert ask(served, {"prompt": [5] * 60, field: 4})[0] == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_more_than_the_room_can_be_cut(cutting: Served, stream: bool) -> None:
    body = {"model": "tiny", "prompt": [[5] * 60, [5] * 10], "max_tokens": 20, "stream": stream, "ignore_eos": True}
    status, headers, text = cutting.ask(
        "POST", TEXT, {**body, "stream_options": {"include_usage": True} if stream else None}
    )
    assert (status, headers[HEADER]) == (200, "4")
    last = json.loads(text.split("data: ")[-2] if stream else text)
    assert last["usage"]["completion_tokens"] == 4 + 20
    assert HEADER not in ask(cutting, {"prompt": [5] * 60, "max_tokens": 4})[1]


def test_a_cut_answer_is_the_beginning_of_the_whole_one(served: Served, cutting: Served) -> None:
    prompt = [5] * 50
    whole = ask(served, {"prompt": prompt, "max_tokens": 14})[2]["choices"]
    cut = ask(cutting, {"prompt": prompt, "max_tokens": 4000})[2]["choices"]
    assert cut == whole and cut[0]["finish_reason"] == "length"


def test_chat_fills_the_context(served: Served, cutting: Served) -> None:
    messages = [{"role": "user", "content": "a b c"}]
    status, _, answer = ask(served, {"messages": messages, "ignore_eos": True}, CHAT)
    assert status == 200 and answer["usage"]["total_tokens"] == CONTEXT
    status, headers, cut = ask(cutting, {"messages": messages, "ignore_eos": True, "max_tokens": 4096}, CHAT)
    assert status == 200 and cut["choices"] == answer["choices"]
    assert headers[HEADER] == str(answer["usage"]["completion_tokens"])


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_max_completion_tokens_counts_if_both_are_given(served: Served, path: str) -> None:
    prompt: dict[str, Any] = {"prompt": "x"} if path == TEXT else {"messages": [{"role": "user", "content": "x"}]}
    for lengths in ({"max_tokens": 9, "max_completion_tokens": 3}, {"max_tokens": 1000, "max_completion_tokens": 3}):
        status, _, answer = ask(served, {**prompt, **lengths, "ignore_eos": True}, path)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 3)


def test_the_budget_names_the_field_that_was_given() -> None:
    server = Served("engine.max_model_len=64", "server.max_tokens_in_flight=100")
    body = {"prompt": [5, 6], "n": 3, "temperature": 1.0}
    try:
        for field in ("max_tokens", "max_completion_tokens"):
            status, _, answer = ask(server, {**body, field: 40})
            assert (status, answer["error"]["param"]) == (400, field)
            assert f"lower {field}" in answer["error"]["message"]
    finally:
        server.close()
