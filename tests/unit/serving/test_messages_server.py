"""The Messages API over a scripted pipeline, asked by Anthropic's own client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.types import RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from pydantic import TypeAdapter

from ssd.testing.twins.served import SOON_S, Served

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
KEY = "a-key-of-at-least-16"
EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
VALID = {"model": "tiny", "max_tokens": 2, "messages": HELLO, "seed": 1}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.close()


def client_of(served: Served, key: str = "none") -> anthropic.Anthropic:
    url = f"http://127.0.0.1:{served.port}"
    return anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=SOON_S)


def chat_text(served: Served, **fields: Any) -> str:
    _, _, text = served.ask("POST", "/v1/chat/completions", {"model": "tiny", "messages": HELLO, **fields})
    return json.loads(text)["choices"][0]["message"]["content"]


def error_of(text: str) -> dict[str, Any]:
    """The error of an answer, in Anthropic's shape and with a message of one line."""
    body = json.loads(text)
    assert set(body) == {"type", "error", "request_id"} and set(body["error"]) == {"type", "message"}
    if body["error"]["type"] != "request_too_large":  # documented, but not among the client's types
        ErrorResponse.model_validate(body)
    assert body["error"]["message"] and "\n" not in body["error"]["message"] and len(body["error"]["message"]) <= 1000
    return body["error"]


def check_refused(served: Served, body: Any, said: str = "", status: int = 400, path: str = PATH) -> None:
    """A body is refused; the server then still answers a valid request."""
    got, headers, text = served.ask("POST", path, body)
    assert got == status, text
    error = error_of(text)
    assert said in error["message"] and headers["request-id"] == json.loads(text)["request_id"]
    status, _, text = served.ask("POST", PATH, VALID)
    assert status == 200 and json.loads(text)["content"][0]["text"] == chat_text(served, max_tokens=2, seed=1)


def test_a_message(served: Served) -> None:
    raw = client_of(served).messages.with_raw_response.create(
        model="tiny", max_tokens=9, messages=HELLO, extra_body={"seed": 3}
    )
    message = raw.parse()
    [block] = message.content
    assert block.type == "text" and block.text == chat_text(served, max_tokens=9, seed=3)
    assert (message.role, message.model, message.stop_reason) == ("assistant", "tiny", "max_tokens")
    assert message.usage.output_tokens == 9
    assert raw.headers["request-id"].startswith("req_")
    assert message.model_dump()["metrics"]["speculative_decoding"]["num_spec_steps"] > 0


def test_a_stream_is_the_whole_message(served: Served) -> None:
    client = client_of(served)
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 40, "messages": HELLO, "extra_body": {"seed": 1}}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text  # type: ignore[union-attr]
    assert final.content == whole.content or final.content[0].text == text  # type: ignore[union-attr]
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_events(served: Served) -> None:
    status, headers, text = served.ask("POST", PATH, {**VALID, "max_tokens": 20, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream") and "request-id" in headers
    names = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        names.append(event["type"])
        if event["type"] != "ping":
            EVENTS.validate_python(event)
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_stop_sequences(served: Served) -> None:
    whole = chat_text(served, max_tokens=30, seed=2)
    stop = whole[len(whole) // 2 :][:3]
    message = client_of(served).messages.create(
        model="tiny", max_tokens=30, messages=HELLO, stop_sequences=["@@@", stop], extra_body={"seed": 2}
    )
    assert message.content[0].text == whole[: whole.find(stop)]  # type: ignore[union-attr]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)


@pytest.mark.parametrize("length", [1, 3000])
def test_count_tokens(served: Served, length: int) -> None:
    """Also of a conversation that is too long to be answered."""
    messages: list[Any] = [{"role": "user", "content": "x y " * length}]
    counted = client_of(served).messages.count_tokens(model="tiny", messages=messages, system="Be brief")
    if length == 1:
        message = client_of(served).messages.create(model="tiny", max_tokens=1, messages=messages, system="Be brief")
        usage = message.usage
        assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    else:
        assert counted.input_tokens > served.engine.config.engine.max_model_len


def test_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    server = Served(f"server.api_key_file={keys}")
    try:
        with pytest.raises(anthropic.AuthenticationError) as refused:
            client_of(server, "wrong-key-0123456789").messages.create(model="tiny", max_tokens=1, messages=HELLO)
        assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index, call-overload]
        assert client_of(server, KEY).messages.create(model="tiny", max_tokens=1, messages=HELLO).content
        # The key may come either way, to every door.
        for headers in ({"x-api-key": KEY}, {"authorization": f"Bearer {KEY}"}):
            for path in (PATH, "/v1/chat/completions"):
                assert server.ask("POST", path, VALID, headers)[0] == 200
        both = {"x-api-key": KEY, "authorization": "Bearer wrong-key-0123456789"}
        assert server.ask("POST", PATH, VALID, both)[0] == 200
        assert server.ask("POST", PATH, VALID)[0] == 401
        assert error_of(server.ask("POST", COUNT, VALID)[2])["type"] == "authentication_error"
        # OpenAI's doors keep their shape.
        assert set(json.loads(server.ask("POST", "/v1/responses", VALID)[2])) == {"error"}
    finally:
        server.close()


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "kind"),
    [
        ("GET", "/v1/messages/batches", {}, 404, "not_found_error"),
        ("GET", PATH, {}, 405, "invalid_request_error"),
        ("POST", PATH, {"origin": "http://evil.example"}, 403, "permission_error"),
        ("POST", PATH, {"host": "evil.example"}, 421, "invalid_request_error"),
        ("POST", PATH, {"content-type": "text/plain"}, 415, "invalid_request_error"),
    ],
    ids=["path", "method", "origin", "host", "content type"],
)
def test_errors_before_the_body(
    served: Served, method: str, path: str, headers: dict[str, str], status: int, kind: str
) -> None:
    got, _, text = served.ask(method, path, VALID if method == "POST" else None, headers)
    assert got == status and error_of(text)["type"] == kind


def test_a_body_that_is_too_long(served: Served) -> None:
    status, _, text = served.ask("POST", PATH, b" " * (2**20 + 1))
    assert status == 413 and error_of(text)["type"] == "request_too_large"


def test_too_much_at_once() -> None:
    server = Served("engine.max_batch=1", "server.max_queue=0", round_s=0.1)
    try:
        # One in the slot, one ready to follow.
        with server.client().completions.create(model="tiny", prompt=["a", "b"], max_tokens=400, stream=True) as stream:
            next(stream)
            status, headers, text = server.ask("POST", PATH, VALID)
            assert (status, error_of(text)["type"]) == (429, "rate_limit_error") and headers["retry-after"]
        server.until(lambda: server.engine.running == 0)
    finally:
        server.close()


def test_a_pipeline_that_breaks() -> None:
    server = Served(round_s=0.02)
    try:
        with client_of(server).messages.stream(model="tiny", max_tokens=400, messages=HELLO) as stream:
            events = iter(stream)
            next(events)
            server.pipeline.killed.set()
            with pytest.raises(anthropic.APIStatusError) as broken:
                list(events)
        assert error_of(json.dumps(broken.value.body))["type"] == "overloaded_error"
        server.until(lambda: not server.engine.ready)
        status, _, text = server.ask("POST", PATH, VALID)
        assert (status, error_of(text)["type"]) == (503, "overloaded_error")
    finally:
        server.close()


def test_an_unexpected_error(served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """In both forms of an answer it has the door's shape, and tells no more than its type."""

    def broken(*_: Any) -> list[Any]:
        raise ZeroDivisionError("a secret")

    with monkeypatch.context() as patch:
        patch.setattr("ssd.serving.anthropic.writer.MessageWriter.add", broken)
        status, _, text = served.ask("POST", PATH, VALID)
        assert status == 500 and error_of(text)["type"] == "api_error" and "secret" not in text
        status, _, text = served.ask("POST", PATH, {**VALID, "stream": True})
        name, data = text.strip().split("\n\n")[-1].split("\n")
        assert (status, name) == (200, "event: error") and "secret" not in text
        assert error_of(data.removeprefix("data: "))["type"] == "api_error"
    assert "a secret" in caplog.text
    assert served.ask("POST", PATH, VALID)[0] == 200


def test_a_client_that_leaves_frees_its_slot() -> None:
    server = Served(round_s=0.02)
    try:
        with client_of(server).messages.stream(model="tiny", max_tokens=400, messages=HELLO) as stream:
            next(iter(stream))
        server.until(lambda: server.pipeline.busy == server.engine.running == 0)
    finally:
        server.close()


SURROGATE = "a\ud800b"
BLOCKS: dict[str, Any] = {
    "image": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}},
    "document": {"type": "document", "source": {"type": "text", "data": "x"}},
    "search_result": {"type": "search_result"},
    "tool_use": {"type": "tool_use", "id": "1", "name": "f", "input": {}},
    "number": {"type": 5},
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("within", ["message", "tool result", "system"])
def test_blocks_that_are_not_text_are_named(served: Served, name: str, within: str) -> None:
    body: dict[str, Any] = {**VALID, "messages": [{"role": "user", "content": [BLOCKS[name]]}]}
    if within == "tool result":
        result = {"type": "tool_result", "tool_use_id": "1", "content": [BLOCKS[name]]}
        body["messages"] = [{"role": "user", "content": [result]}]
    if within == "system":
        body = {**VALID, "system": [BLOCKS[name]]}
    check_refused(served, body, "" if name == "number" else name)
    check_refused(served, body, path=COUNT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "gpt"}, "gpt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 100000}, "100000"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": [5]}, "messages.0"),
        ({"messages": [{}]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f"}]}]}, "input"),
        ({"messages": [{"role": "user", "content": SURROGATE}]}, "surrogate"),
        ({"messages": [{"role": "user", "content": "x y " * 3000}]}, "max_model_len"),
        ({"system": 5}, "system"),
        ({"system": SURROGATE}, "surrogate"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"stop_sequences": [5]}, "stop_sequences"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e39}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 10**30}, "top_k"),
        ({"seed": 1.5}, "seed"),
        ({"method": "magic"}, "method"),
        ({"stream": "yes"}, "stream"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
        ({"tools": [{"name": "f"}]}, "input_schema"),
        ({"tools": [{"name": "f", "input_schema": 5}]}, "input_schema"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "some"}}, "some"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"thinking": {"type": "deep"}}, "deep"),
        ({"thinking": True}, "thinking"),
        ({"thinking": {"type": "enabled"}, "chat_template_kwargs": 5}, "chat_template_kwargs"),
        ({"output_config": {"format": {"type": "xml"}}}, "xml"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "odd"}}}}, "output_config.format"),
        ({"container": "c"}, "container"),
        ({"messages": [[]]}, "messages.0"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_bodies_that_are_refused(served: Served, change: dict[str, Any], said: str) -> None:
    check_refused(served, {**VALID, **change}, said, 404 if change == {"model": "gpt"} else 400)


@pytest.mark.parametrize("path", [PATH, COUNT])
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"{}",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"max_tokens": NaN}',
        b'{"model": "tiny", "model": "tiny"}',
        b'{"messages": [{"role": "user", "content": ' + b"9" * 5000 + b"}]}",
    ],
    ids=lambda raw: ascii(raw)[:30],
)
def test_broken_bodies(served: Served, path: str, raw: bytes) -> None:
    check_refused(served, raw, path=path)


def test_no_request_is_left(served: Served) -> None:
    """After all the tests above."""
    served.until(lambda: served.engine.running == served.engine.queued == served.engine.tokens_in_flight == 0)
