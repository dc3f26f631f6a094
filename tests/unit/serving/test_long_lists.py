"""Lists in bodies have a greatest length, whatever front door they come through."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ssd.serving.http.bodies import MAX_ITEMS
from ssd.testing.twins.served import Served

MESSAGE = {"role": "user", "content": "hi"}
PART = {"type": "text", "text": "hi"}
DOORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", "messages", {"messages": [MESSAGE]}),
    "chat parts": ("/v1/chat/completions", "messages", {"messages": [{"role": "user", "content": [PART]}]}),
    "tokenize": ("/tokenize", "messages", {"messages": [MESSAGE]}),
    "responses": ("/v1/responses", "input", {"input": [{"type": "message", **MESSAGE}]}),
    "responses count": ("/v1/responses/input_tokens", "input", {"input": [{"type": "message", **MESSAGE}]}),
    "messages": ("/v1/messages", "messages", {"messages": [MESSAGE], "max_tokens": 1}),
    "messages parts": (
        "/v1/messages",
        "messages",
        {"messages": [{"role": "user", "content": [PART]}], "max_tokens": 1},
    ),
    "messages count": ("/v1/messages/count_tokens", "messages", {"messages": [MESSAGE]}),
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served("server.chat_template=embedded/chat_template.jinja")
    yield server
    server.close()


def lengthened(value: Any, count: int) -> Any:
    """Returns a value with its innermost list repeated."""
    if isinstance(value, dict):
        return {key: lengthened(item, count) for key, item in value.items()}
    if isinstance(value, list):
        inner = [item for item in value if isinstance(item, dict) and isinstance(item.get("content"), list)]
        return [lengthened(item, count) for item in inner] if inner else value * count
    return value


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("count", [MAX_ITEMS + 1, 15_000])
def test_a_list_that_is_too_long(served: Served, name: str, count: int) -> None:
    path, field, body = DOORS[name]
    status, _, text = served.ask("POST", path, lengthened({"model": "tiny", **body}, count))
    error = json.loads(text)["error"]
    assert status == 400
    assert error["message"].startswith(field) and f"at most {MAX_ITEMS} items" in error["message"], error


@pytest.mark.parametrize("prompt", [["hi"], [[1, 2]]], ids=["texts", "ids"])
def test_too_many_prompts(served: Served, prompt: list[Any]) -> None:
    """They have a lower limit."""
    status, _, text = served.ask("POST", "/v1/completions", {"model": "tiny", "prompt": prompt * 15_000})
    error = json.loads(text)["error"]
    assert status == 400 and error["param"] == "prompt" and "at most 128 prompts" in error["message"]


@pytest.mark.parametrize("name", ["chat", "responses", "messages", "tokenize"])
def test_a_list_that_is_not_too_long_is_read(served: Served, name: str) -> None:
    path, _, body = DOORS[name]
    status, _, text = served.ask("POST", path, lengthened({"model": "tiny", **body}, MAX_ITEMS))
    assert status == 200 or f"at most {MAX_ITEMS} items" not in text


def test_long_lists_keep_nobody_waiting(served: Served) -> None:
    """The event loop answers others while such bodies are read."""
    path, _, body = DOORS["chat"]
    raw = json.dumps(lengthened({"model": "tiny", **body}, 20_000)).encode()
    over = threading.Event()

    def send() -> None:
        while not over.is_set():
            served.ask("POST", path, raw)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        times = []
        for _ in range(20):
            began = time.perf_counter()
            assert served.ask("GET", "/health")[0] == 200
            times.append(time.perf_counter() - began)
    finally:
        over.set()
        sender.join()
    assert sorted(times)[len(times) // 2] < 0.1
