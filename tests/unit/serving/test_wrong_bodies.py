"""Bodies that pydantic refuses get the same words from every front door."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ssd.testing.twins.served import Served

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
NUMBER_IN_TEXT = {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}], "max_tokens": 1}
NO_ROLE = {"messages": [{"content": "x"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served("server.chat_template=embedded/chat_template.jinja")
    yield server
    server.close()


def message(served: Served, path: str, body: dict[str, Any]) -> str:
    status, _, text = served.ask("POST", path, {"model": "tiny", **body})
    assert status == 400
    return str(json.loads(text)["error"]["message"])


@pytest.mark.parametrize(
    ("path", "body", "start"),
    [
        (CHAT, NUMBER_IN_TEXT, "messages.0.content.0.text: Input should be a valid string"),
        (MESSAGES, NUMBER_IN_TEXT, "messages.0.content.0.text: Input should be a valid string"),
        (CHAT, NO_ROLE, "messages.0.role: Field required"),
        (COMPLETIONS, {"prompt": ["a", 5]}, "prompt.1: Input should be a valid string"),
        (COMPLETIONS, {"prompt": [[3], [4, -1]]}, "prompt.1.1: Input should be greater than or equal to 0"),
        (COMPLETIONS, {"prompt": 5}, "prompt: Input should be a valid string or a valid list"),
        (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, "temperature: Input should be a valid number"),
        (COMPLETIONS, {"prompt": "x", "stop": ["a"] * 17}, "stop: at most 16 items are allowed"),
    ],
    ids=["chat text", "messages text", "role", "texts", "lists of ids", "number", "temperature", "stops"],
)
def test_the_field_and_what_it_should_be(served: Served, path: str, body: dict[str, Any], start: str) -> None:
    assert message(served, path, body).startswith(start)
