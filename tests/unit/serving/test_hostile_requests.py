"""Broken and hostile requests: each gets an OpenAI error of one line, and the server keeps working."""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ssd.config.load import load_config
from ssd.engine.async_engine import AsyncEngine
from ssd.engine.front import Front
from ssd.errors import ConfigError, PipelineError
from ssd.serving.app import build_app
from ssd.serving.http.errors import as_api_error
from ssd.serving.metrics import Metrics
from ssd.serving.openai.generation import Generation
from ssd.testing.twins.served import Served

SURROGATE = "a\ud800b"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
VALID = {"model": "tiny", "prompt": "x", "max_tokens": 2, "seed": 1}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.close()


def error_of(text: str) -> dict[str, Any]:
    """The error of an answer, in OpenAI's shape and with a message of one line."""
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) <= 1000
    return error


def check_refused(served: Served, path: str, body: Any, param: str | None, status: int = 400, **headers: str) -> str:
    """The message with which a body is refused; the server then still answers a valid request."""
    got, _, text = served.ask("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    assert got == status, text
    error = error_of(text)
    assert error["param"] == param
    status, _, text = served.ask("POST", COMPLETIONS, VALID)
    assert (status, json.loads(text)["choices"][0]["text"]) == (200, served.text("x", 1, 2))
    return error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": SURROGATE}, "prompt"),
        ({"prompt": ["fine", SURROGATE]}, "prompt"),
        ({"stop": SURROGATE}, "stop"),
        ({"stop": ["fine", SURROGATE]}, "stop"),
        ({"bad_words": [SURROGATE]}, "bad_words"),
        ({"model": SURROGATE}, "model"),
        ({"user": SURROGATE}, "user"),
        ({"safety_identifier": SURROGATE}, "safety_identifier"),
        ({"metadata": {"key": SURROGATE}}, "metadata"),
        ({"metadata": {SURROGATE: "value"}}, "metadata"),
        ({"logit_bias": {SURROGATE: 1}}, "logit_bias"),
        ({"method": SURROGATE}, "method"),
        ({"tools": [{"type": "function", "function": {"name": SURROGATE}}]}, "tools"),
        ({"tool_choice": SURROGATE}, "tool_choice"),
        ({"suffix": SURROGATE}, "suffix"),
        ({"structured_outputs": {"regex": SURROGATE}}, "structured_outputs"),
        ({"structured_outputs": {"choice": [SURROGATE]}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"const": SURROGATE}}}, "structured_outputs"),
        ({SURROGATE: 1}, "a\\ud800b"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_lone_surrogates_are_named(served: Served, change: dict[str, Any], param: str) -> None:
    message = check_refused(served, COMPLETIONS, {**VALID, **change}, param)
    assert "surrogate" in message


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": SURROGATE},
        {"role": "user", "content": [{"type": "text", "text": SURROGATE}]},
        {"role": "user", "content": "x", "name": SURROGATE},
        {"role": SURROGATE, "content": "x"},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": SURROGATE}]},
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_lone_surrogates_in_messages(served: Served, message: dict[str, Any]) -> None:
    said = check_refused(served, CHAT, {"model": "tiny", "max_tokens": 2, "messages": [message]}, "messages")
    assert "messages.0" in said and "surrogate" in said


NUMBERS = (10**39, -(10**39), 1e39, -1e39, 2**64, -(2**64), 10**400)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"{str(number)[:12]}…")
@pytest.mark.parametrize(
    "name",
    [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "min_tokens",
        "max_tokens",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "seed",
        "n",
        "logprobs",
        "priority",
    ],
)
def test_numbers_out_of_range(served: Served, name: str, number: Any) -> None:
    check_refused(served, COMPLETIONS, {**VALID, name: number}, name)


@pytest.mark.parametrize("number", NUMBERS[::2], ids=lambda number: f"{str(number)[:12]}…")
@pytest.mark.parametrize(
    ("name", "wrapped"),
    [
        ("prompt", lambda number: [number]),
        ("prompt", lambda number: [[1], [number]]),
        ("stop_token_ids", lambda number: [number]),
        ("allowed_token_ids", lambda number: [number]),
        ("bad_words", lambda number: [[number]]),
        ("logit_bias", lambda number: {"5": number}),
        ("logit_bias", lambda number: {str(number): 1}),
        ("echo", lambda number: number),
    ],
    ids=["prompt", "prompts", "stop", "allowed", "bad-words", "bias", "bias-key", "echo"],
)
def test_numbers_out_of_range_within_lists(served: Served, name: str, wrapped: Any, number: Any) -> None:
    check_refused(served, COMPLETIONS, {**VALID, name: wrapped(number)}, name)


def with_field(field: str) -> bytes:
    return b'{"model":"tiny","prompt":"x","max_tokens":2,' + field.encode() + b"}"


@pytest.mark.parametrize(
    ("raw", "param", "said"),
    [
        (b"", None, "empty"),
        (b" \n ", None, "empty"),
        (b"null", None, "object"),
        (b'"x"', None, "object"),
        (b"{", None, "not valid JSON"),
        (b"{}x", None, "not valid JSON"),
        (b"\xff\xfe{}", None, "UTF-8"),
        (b'{"model": "\xff"}', None, "UTF-8"),
        (b"\xef\xbb\xbf{}", None, "not valid JSON"),
        ('{"model": "tiny"}'.encode("utf-16"), None, "UTF-8"),
        (with_field('"temperature": NaN'), None, "NaN"),
        (with_field('"temperature": Infinity'), None, "Infinity"),
        (with_field('"temperature": -Infinity'), None, "-Infinity"),
        (with_field('"temperature": 1e999'), "temperature", "temperature"),
        (with_field('"structured_outputs": {"json": {"const": 1e999}}'), "structured_outputs", "const"),
        (with_field('"seed": ' + "9" * 5000), None, "digits"),
        (with_field('"seed": 1, "seed": 2'), "seed", "twice"),
        (with_field('"metadata": {"a": "b", "a": "c"}'), "a", "twice"),
        (with_field('"metadata": ' + '{"a":' * 200 + "1" + "}" * 200), "metadata", "nested"),
        (with_field('"prompt_": ' + "[" * 5000 + "]" * 5000), None, "nested"),
        (b"[" * 100_000, None, "nested"),
        (with_field(r'"response_format": {"type": "a\nb"}'), "response_format", "response_format"),
        (with_field(r'"logit_bias": {"a\nb": "x"}'), "logit_bias", "logit_bias"),
        (with_field('"bad_words": ["' + " " * 100_000 + '"]'), "bad_words", "bad_words"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_bodies_that_are_not_requests(served: Served, raw: bytes, param: str | None, said: str) -> None:
    assert said in check_refused(served, COMPLETIONS, raw, param)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "json"])
def test_wrong_content_types(served: Served, kind: str) -> None:
    check_refused(served, COMPLETIONS, json.dumps(VALID).encode(), None, 415, content_type=kind)


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "//", "\xff", "http://a b"])
def test_origins_that_are_not_addresses(served: Served, origin: str) -> None:
    check_refused(served, COMPLETIONS, VALID, None, 403, origin=origin)


@pytest.mark.parametrize("path", ["/v1/models/%ff%fe", "/v1/models/%ED%A0%80", "/v1/models/a%0Ab", "/nowhere"])
def test_paths_that_are_not_text(served: Served, path: str) -> None:
    status, _, text = served.ask("GET", path)
    assert status == 404
    error_of(text)


def test_a_wrong_method_is_an_openai_error(served: Served) -> None:
    status, _, text = served.ask("GET", COMPLETIONS)
    assert status == 405
    error_of(text)


class Broken(RuntimeError):
    """An error that nobody expects."""


def raising(*_: Any, **__: Any) -> Any:
    raise Broken("the inside\nstays inside")


@pytest.mark.parametrize("place", ["tokenize", "open_all", "make", "whole", "models", "metrics", "headers"])
def test_an_unexpected_error_is_an_openai_error(
    served: Served, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        if place in ("tokenize", "open_all"):
            patch.setattr(served.engine, place, raising)
        elif place == "make":  # in a thread
            patch.setattr(Front, "make", raising)
        elif place == "whole":
            patch.setattr(Generation, "whole", raising)
        elif place == "metrics":
            patch.setattr("ssd.serving.metrics.generate_latest", raising)
        elif place == "models":
            patch.setattr("ssd.serving.openai.routes.Models.described", raising)
        else:
            patch.setattr("ssd.serving.http.guard.Guard._check_host", raising)
        with caplog.at_level(logging.ERROR):
            if place in ("models", "metrics"):
                status, _, text = served.ask("GET", {"models": "/v1/models", "metrics": "/metrics"}[place])
            else:
                status, _, text = served.ask("POST", COMPLETIONS, VALID)
            served.until(lambda: "the inside" in caplog.text)  # in the operator's log, not in the answer
    error = error_of(text)
    assert (status, error["type"]) == (500, "server_error")
    assert "Broken" in error["message"] and "inside" not in error["message"]
    assert served.ask("POST", COMPLETIONS, VALID)[0] == 200


@pytest.mark.parametrize("place", ["event", "chunk"])
@pytest.mark.parametrize("choices", [1, 3])
def test_an_unexpected_error_within_a_stream(
    served: Served, place: str, choices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client reads what came before, then an error event, then a clean end."""
    with monkeypatch.context() as patch:
        if place == "event":
            patch.setattr("ssd.engine.stream.RequestStream.__anext__", raising)
        else:
            patch.setattr("ssd.serving.openai.answers.Chat.part", raising)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "n": choices}
        status, _, text = served.ask("POST", CHAT, {**body, "stream": True})
    assert status == 200
    *before, last = [event for event in text.split("\n\n") if event]
    assert before and all("assistant" in event for event in before[:choices])
    error = error_of(last.removeprefix("data: "))
    assert error["type"] == "server_error" and "Broken" in error["message"]
    served.until(lambda: served.engine.running == served.engine.queued == 0)


def test_a_traceback_of_a_worker_is_not_sent() -> None:
    told = as_api_error(PipelineError("the verifier worker failed: x\nTraceback (most recent call last):\n  File"))
    assert (told.status, told.message) == (503, "the verifier worker failed: x")


def test_a_completion_is_not_refused_for_what_it_did_not_ask() -> None:
    """Without ``max_tokens`` an answer is as long as there is room for."""
    server = Served("engine.max_model_len=64")
    try:
        for length, expected in ((63, 1), (60, 4), (48, 16), (10, 16)):
            body = {"model": "tiny", "prompt": [5] * length}
            status, _, text = server.ask("POST", COMPLETIONS, body)
            assert (status, json.loads(text)["usage"]["completion_tokens"]) == (200, expected)
        status, _, text = server.ask("POST", COMPLETIONS, {"model": "tiny", "prompt": [5] * 64})
        assert status == 400 and "max_model_len" in error_of(text)["message"]
        assert server.ask("POST", COMPLETIONS, {"model": "tiny", "prompt": [5] * 60, "max_tokens": 5})[0] == 400
    finally:
        server.close()


def test_a_request_that_never_fits_is_400() -> None:
    server = Served("engine.max_model_len=64", "server.max_tokens_in_flight=100", "server.max_queue=3")
    body = {"model": "tiny", "prompt": [5, 6], "n": 3}
    try:
        status, _, text = server.ask("POST", COMPLETIONS, {**body, "max_tokens": 40})
        assert status == 400 and error_of(text)["param"] == "max_tokens"
        assert "max_tokens_in_flight" in error_of(text)["message"]
        # What was not asked for is cut to what fits instead.
        status, _, text = server.ask("POST", COMPLETIONS, {**body, "n": 6, "temperature": 1.0})
        assert status == 200 and json.loads(text)["usage"]["completion_tokens"] == 6 * (100 // 6 - 2)
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": 2}
        assert server.ask("POST", CHAT, chat)[0] == 200
        # More choices than the queue and the slots ever hold.
        status, _, text = server.ask("POST", COMPLETIONS, {**body, "n": 9, "max_tokens": 1})
        assert status == 400 and "max_queue" in error_of(text)["message"]
        assert server.engine.tokens_in_flight == 0
    finally:
        server.close()


def test_a_limit_below_the_context_is_refused_at_start() -> None:
    engine = AsyncEngine(load_config("embedded", ["server.max_tokens_in_flight=16"]))
    with pytest.raises(ConfigError, match="max_tokens_in_flight"):
        build_app(engine, Metrics(), model="tiny")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_loop_is_not_held_by_a_large_body(served: Served, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other clients are answered while a body is checked, rendered and tokenized."""
    entered, leave = threading.Event(), threading.Event()

    def slow(*_: Any, **__: Any) -> list[int]:
        entered.set()
        assert leave.wait(30)
        return [5, 6]

    messages = [{"role": "user", "content": "x"}]
    body = {"model": "tiny", "max_tokens": 2, "user": "u" * 100_000}
    body |= {"messages": messages} if path == CHAT else {"prompt": "x"}
    with monkeypatch.context() as patch:
        patch.setattr("ssd.serving.openai.chat.ChatTemplate.tokens", slow)
        patch.setattr(served.engine, "tokenize", slow)
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(served.ask("POST", path, body)[0]))
        asking.start()
        assert entered.wait(30)
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=5)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
        leave.set()
        asking.join(30)
    assert answers == [200]


def test_a_client_that_disconnects_while_sending(served: Served) -> None:
    import socket

    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(head + b"Content-Length: 1000\r\n\r\n" + b'{"model"')
    time.sleep(0.1)
    assert served.ask("POST", COMPLETIONS, VALID)[0] == 200


def test_no_request_is_left(served: Served) -> None:
    """After all the tests above."""
    served.until(lambda: served.engine.running == served.engine.queued == served.engine.tokens_in_flight == 0)
