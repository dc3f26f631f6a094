"""The Responses API over a scripted pipeline, asked by OpenAI's own client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from ssd.testing.twins.served import Served

PATH = "/v1/responses"
KEYS = ["a-key-of-at-least-16", "another-key-0123456"]
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
VALID = {"model": "tiny", "input": "hello", "max_output_tokens": 2, "seed": 1}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.close()


def asked(**fields: Any) -> dict[str, Any]:
    """Arguments of the client's methods."""
    return {"model": "tiny", "max_output_tokens": 9, "extra_body": {"seed": 3}, **fields}


def chat_text(served: Served, *messages: tuple[str, str], **fields: Any) -> str:
    listed = [{"role": role, "content": content} for role, content in messages or [("user", "hello")]]
    _, _, text = served.ask("POST", "/v1/chat/completions", {"model": "tiny", "messages": listed, **fields})
    return json.loads(text)["choices"][0]["message"]["content"]


def error_of(text: str) -> dict[str, Any]:
    """The error of an answer, in OpenAI's shape and with a message of one line."""
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) <= 1000
    return error


def test_a_response(served: Served) -> None:
    response = served.client().responses.create(**asked(input="hello", metadata={"a": "b"}))
    assert response.output_text == chat_text(served, max_tokens=9, seed=3)
    assert (response.status, response.model, response.metadata) == ("incomplete", "tiny", {"a": "b"})
    assert response.usage is not None and response.usage.output_tokens == 9
    assert response.model_dump()["metrics"]["speculative_decoding"]["num_spec_steps"] > 0
    Response.model_validate(response.model_dump(warnings=False))


def test_a_conversation(served: Served) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hi"}]},
        {"role": "user", "content": "more"},
    ]
    response = served.client().responses.create(**asked(input=items, instructions="Be brief"))
    conversation = [("system", "Be brief"), ("user", "hello"), ("assistant", "hi"), ("user", "more")]
    assert response.output_text == chat_text(served, *conversation, max_tokens=9, seed=3)


def test_a_stream_is_the_whole_response(served: Served) -> None:
    client = served.client()
    whole = client.responses.create(**asked(input="hello", max_output_tokens=40))
    events = []
    with client.responses.stream(**asked(input="hello", max_output_tokens=40)) as stream:
        for event in stream:
            EVENT.validate_python(event.model_dump(warnings=False))
            events.append(event)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens


def test_events(served: Served) -> None:
    status, headers, text = served.ask("POST", PATH, {**VALID, "max_output_tokens": 20, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    names = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        names.append(event["type"].removeprefix("response."))
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(names[4:-4]) == {"output_text.delta"}


def test_parse_and_a_completed_stream(served: Served) -> None:
    """The scripted pipeline follows no schema, so the text is stopped and checked against the request instead."""
    whole = chat_text(served, max_tokens=30, seed=3)
    stop = whole[len(whole) // 2 :][:3]
    extra = {"seed": 3, "stop": [stop]}
    with served.client().responses.stream(**asked(input="hello", max_output_tokens=30, extra_body=extra)) as stream:
        final = stream.get_final_response()
    assert final.status == "completed" and final.output_text == whole[: whole.find(stop)]
    plain = {"format": {"type": "text"}}
    parsed = served.client().responses.parse(**asked(input="hello", max_output_tokens=30, extra_body=extra, text=plain))
    assert parsed.output_text == final.output_text and parsed.output_parsed is None


def test_a_response_is_kept(served: Served) -> None:
    client = served.client()
    response = client.responses.create(**asked(input="hello"))
    assert client.responses.retrieve(response.id).model_dump() == response.model_dump()
    client.responses.delete(response.id)
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="responses_bytes"):
            ask(response.id)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_conversation_is_continued(served: Served, stream: bool) -> None:
    client = served.client()

    def create(**fields: Any) -> Any:
        if not stream:
            return client.responses.create(**asked(**fields))
        return list(client.responses.create(**asked(**fields, stream=True)))[-1].response

    first = create(input="hello", instructions="Be brief")
    second = create(input="more", previous_response_id=first.id)
    # Instructions hold for one response.
    so_far = [("user", "hello"), ("assistant", first.output_text), ("user", "more")]
    assert second.output_text == chat_text(served, *so_far, max_tokens=9, seed=3)
    assert second.previous_response_id == first.id
    third = create(input=[{"role": "user", "content": "last"}], previous_response_id=second.id)
    so_far += [("assistant", second.output_text), ("user", "last")]
    assert third.output_text == chat_text(served, *so_far, max_tokens=9, seed=3)
    items = client.responses.input_items.list(third.id, order="asc", limit=2)
    texts = [item.content[0].text for item in items]  # reads all pages
    assert texts == [text for _, text in so_far]
    # The first may go: the others hold the whole conversation.
    client.responses.delete(first.id)
    assert create(input="x", previous_response_id=second.id).output_text


def test_a_response_that_is_not_kept(served: Served) -> None:
    client = served.client()
    response = client.responses.create(**asked(input="hello", store=False))
    assert response.store is False  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError, match=response.id) as gone:
        client.responses.create(**asked(input="more", previous_response_id=response.id))
    assert gone.value.param == "previous_response_id" and gone.value.code == "previous_response_not_found"


def test_memory_is_bounded() -> None:
    server = Served("server.responses_bytes=20000")
    client = server.client()
    try:
        kept = [client.responses.create(**asked(input=f"hello {number}")).id for number in range(30)]

        def present(name: str) -> bool:
            return server.ask("GET", f"{PATH}/{name}")[0] == 200

        found = [present(name) for name in kept]
        assert any(found) and found == sorted(found)  # the oldest are gone
        large = client.responses.create(**asked(input="hello", metadata={"a": "x" * 30_000})).id
        assert not present(large) and present(kept[-1])
    finally:
        server.close()


def test_clients_do_not_see_each_other(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("\n".join(KEYS))
    server = Served(f"server.api_key_file={keys}")
    try:
        mine, theirs = (server.client(key) for key in KEYS)
        response = mine.responses.create(**asked(input="hello"))
        assert mine.responses.retrieve(response.id).id == response.id
        for ask in (theirs.responses.retrieve, theirs.responses.delete, theirs.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                ask(response.id)
        with pytest.raises(openai.NotFoundError):
            theirs.responses.create(**asked(input="x", previous_response_id=response.id))
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong-key-0123456789").responses.retrieve(response.id)
    finally:
        server.close()


def test_cancelling_what_is_over(served: Served) -> None:
    client = served.client()
    response = client.responses.create(**asked(input="hello"))
    with pytest.raises(openai.BadRequestError, match="is over"):
        client.responses.cancel(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_1")
    with pytest.raises(openai.BadRequestError, match="stream"):
        list(client.responses.retrieve(response.id, stream=True))


def test_a_client_that_leaves_frees_its_slot() -> None:
    server = Served(round_s=0.02)
    try:
        with server.client().responses.stream(**asked(input="hello", max_output_tokens=400)) as stream:
            next(iter(stream))
        server.until(lambda: server.pipeline.busy == server.engine.running == 0)
    finally:
        server.close()


def test_a_pipeline_that_breaks() -> None:
    server = Served(round_s=0.02)
    try:
        events = iter(server.client().responses.create(**asked(input="x", max_output_tokens=400, stream=True)))
        next(events)
        server.pipeline.killed.set()
        last = list(events)[-1]
        EVENT.validate_python(last.model_dump(warnings=False))
        assert last.type == "response.failed" and last.response.error.code == "server_error"
        server.until(lambda: not server.engine.ready)
        assert server.ask("POST", PATH, VALID)[0] == 503
    finally:
        server.close()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_logprobs(served: Served, stream: bool) -> None:
    fields = asked(input="hello", include=["message.output_text.logprobs"], top_logprobs=2)
    answer = served.client().responses.create(**fields, stream=stream)
    events = list(answer) if stream else []
    response = events[-1].response if stream else answer
    [part] = response.output[0].content
    assert "".join(one.token for one in part.logprobs) == part.text == chat_text(served, max_tokens=9, seed=3)
    assert len(part.logprobs) == 9 and all(len(one.top_logprobs) == 2 for one in part.logprobs)
    if stream:
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        told = [one.token for event in deltas for one in event.logprobs]
        assert told == [one.token for one in part.logprobs]
    plain = served.client().responses.create(**asked(input="hello"))
    assert plain.output[0].content[0].logprobs == []


def test_input_tokens(served: Served) -> None:
    client = served.client()
    response = client.responses.create(**asked(input="hello", instructions="Be brief"))
    counted = client.responses.input_tokens.count(model="tiny", input="hello", instructions="Be brief")
    assert response.usage is not None and counted.input_tokens == response.usage.input_tokens
    more = client.responses.input_tokens.count(model="tiny", input="x y " * 3000, previous_response_id=response.id)
    assert more.input_tokens > served.engine.config.engine.max_model_len


def test_truncation() -> None:
    """The oldest turns go where the context is too short; what the system said stays."""
    server = Served("engine.max_model_len=64")
    try:
        client = server.client()
        turns = [("user", f"w{number} " * 5) for number in range(12)]
        items = [{"role": "developer", "content": "Be brief"}]
        items += [{"role": role, "content": content} for role, content in turns]
        with pytest.raises(openai.BadRequestError, match="max_model_len") as refused:
            client.responses.create(**asked(input=items))
        assert refused.value.code == "context_length_exceeded"
        response = client.responses.create(**asked(input=items, truncation="auto"))
        fitting = [
            chat_text(server, ("system", "Be brief"), *turns[start:], max_tokens=9, seed=3)
            for start in range(1, 12)
            if count(server, turns[start:]) + 9 <= 64
        ]
        assert response.output_text == fitting[0]
        with pytest.raises(openai.BadRequestError, match="max_model_len"):
            client.responses.create(**asked(input="x y " * 100, truncation="auto"))
    finally:
        server.close()


def count(served: Served, turns: list[tuple[str, str]]) -> int:
    messages = [{"role": role, "content": content} for role, content in turns]
    body = {"model": "tiny", "system": "Be brief", "messages": messages}
    return json.loads(served.ask("POST", "/v1/messages/count_tokens", body)[2])["input_tokens"]


SURROGATE = "a\ud800b"


def check_refused(served: Served, body: Any, param: str | None, status: int = 400) -> str:
    """The message with which a body is refused; the server then still answers a valid request."""
    got, _, text = served.ask("POST", PATH, body)
    assert got == status, text
    error = error_of(text)
    assert error["param"] == param
    assert served.ask("POST", PATH, VALID)[0] == 200
    return error["message"]


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"model": "gpt"}, "model", "gpt"),
        ({"input": None}, "input", "input"),
        ({"input": 5}, "input", "input"),
        ({"input": []}, "input", "input"),
        ({"input": {}}, "input", "input"),
        ({"input": [5]}, "input", "input.0"),
        ({"input": [{}]}, "input", "input.0"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input", "tool"),
        ({"input": [{"role": "user"}]}, "input", "input.0.content"),
        ({"input": [{"role": "user", "content": 5}]}, "input", "input.0.content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "input_image"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input", "input_file"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input", "input.0.content.0.text"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "item_reference"),
        ({"input": [{"type": "custom_tool_call"}]}, "input", "custom_tool_call"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input", "arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": 5}]}, "input", "output"),
        ({"input": SURROGATE}, "input", "surrogate"),
        ({"input": "x y " * 3000}, "input", "max_model_len"),
        ({"instructions": 5}, "instructions", "instructions"),
        ({"instructions": SURROGATE}, "instructions", "surrogate"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens"),
        ({"max_output_tokens": "9"}, "max_output_tokens", "max_output_tokens"),
        ({"max_output_tokens": 10**30}, "max_output_tokens", "large"),
        ({"temperature": -1}, "temperature", "temperature"),
        ({"temperature": 1e39}, "temperature", "temperature"),
        ({"temperature": "hot"}, "temperature", "temperature"),
        ({"top_p": 0}, "top_p", "top_p"),
        ({"top_k": 10**30}, "top_k", "large"),
        ({"seed": 1.5}, "seed", "seed"),
        ({"stop": [""]}, "stop", "stop"),
        ({"method": "magic"}, "method", "method"),
        ({"stream": "yes"}, "stream", "stream"),
        ({"store": "yes"}, "store", "store"),
        ({"background": True}, "background", "background"),
        ({"previous_response_id": 5}, "previous_response_id", "previous_response_id"),
        ({"metadata": {"a": 5}}, "metadata", "metadata.a"),
        ({"metadata": {SURROGATE: "x"}}, "metadata", "surrogate"),
        ({"include": ["message.output"]}, "include", "message.output"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
        ({"top_logprobs": -1}, "top_logprobs", "0"),
        ({"include": "x"}, "include", "include"),
        ({"truncation": "some"}, "truncation", "some"),
        ({"text": {"format": {"type": "xml"}}}, "text", "xml"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text", "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "odd"}}}}, "text.format", "odd"),
        ({"tools": {}}, "tools", "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        ({"tools": [{"type": "mcp"}]}, "tools", "mcp"),
        ({"tools": [{"type": "function"}]}, "tools", "tools.0.name"),
        ({"tool_choice": "some"}, "tool_choice", "some"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice", "mcp"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "name"),
        ({"reasoning": "high"}, "reasoning", "reasoning"),
        ({"reasoning": {"effort": 5}}, "reasoning", "reasoning.effort"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_bodies_that_are_refused(served: Served, change: dict[str, Any], param: str, said: str) -> None:
    status = 404 if change == {"model": "gpt"} else 400
    assert said in check_refused(served, {**VALID, **change}, param, status)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"input": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"temperature": NaN}',
        b'{"input": [{"role": "user", "content": ' + b"9" * 5000 + b"}]}",
    ],
    ids=lambda raw: ascii(raw)[:30],
)
def test_broken_bodies(served: Served, raw: bytes) -> None:
    got, _, text = served.ask("POST", PATH, raw)
    assert got == 400 and error_of(text)


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=101", "order=some", "after=x"])
def test_queries_that_are_refused(served: Served, query: str) -> None:
    name = served.client().responses.create(**asked(input="hello")).id
    status, _, text = served.ask("GET", f"{PATH}/{name}/input_items?{query}")
    assert status == (404 if query == "after=x" else 400) and error_of(text)["param"] == query.partition("=")[0]


def test_no_request_is_left(served: Served) -> None:
    """After all the tests above."""
    served.until(lambda: served.engine.running == served.engine.queued == served.engine.tokens_in_flight == 0)
