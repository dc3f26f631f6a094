"""/tokenize, /detokenize and the small routes that vLLM has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ssd import __version__
from ssd.testing.twins.served import Served

TEXTS = ["def main():", "x" * 5000, "naïve 😀 — done", "", "<eos> is written out"]
TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]
SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served("server.chat_template_kwargs={}")
    yield server
    server.close()


def post(served: Served, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    status, headers, text = served.ask("POST", path, body)
    assert headers["content-type"].startswith("application/json")
    return status, json.loads(text)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("special", [None, True, False], ids=str)
def test_texts(special: bool | None, text: str, served: Served) -> None:
    tokenizer = served.engine.tokenizer
    asked = {"prompt": text} if special is None else {"prompt": text, "add_special_tokens": special}
    status, told = post(served, "/tokenize", {"model": "tiny", **asked})
    ids = tokenizer(text, add_special_tokens=special is not False)["input_ids"]
    limit = served.engine.config.engine.max_model_len
    assert (status, told) == (200, {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": None})
    status, told = post(served, "/tokenize", {**asked, "return_token_strs": True})
    assert told["token_strs"] == tokenizer.convert_ids_to_tokens(ids)
    status, told = post(served, "/detokenize", {"tokens": ids})
    assert (status, told) == (200, {"prompt": tokenizer.decode(ids)})
    if special is None:
        assert told["prompt"] == text


def test_messages_are_those_of_a_chat(served: Served) -> None:
    """The very prompt that a chat completion has."""
    for extra in ({}, {"add_generation_prompt": False}, {"tools": [SEARCH]}, {"add_special_tokens": True}):
        status, told = post(served, "/tokenize", {"messages": TALK, "return_token_strs": True, **extra})
        body = {"model": "tiny", "messages": TALK, "max_tokens": 1, "return_token_ids": True, **extra}
        _, chat = post(served, "/v1/chat/completions", body)
        assert status == 200 and told["tokens"] == chat["prompt_token_ids"]
        assert told["token_strs"] == served.engine.tokenizer.convert_ids_to_tokens(told["tokens"])
    long = [{"role": "user", "content": "word " * 5000}]
    status, told = post(served, "/tokenize", {"messages": long})
    assert status == 200 and told["count"] > served.engine.config.engine.max_model_len


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/tokenize", {"messages": TALK, "model": "other"}, 404, "model"),
        ("/detokenize", {"tokens": [], "model": "other"}, 404, "model"),
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, 400, None),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "x", "return_token_strs": 1}, 400, "return_token_strs"),
        ("/tokenize", {"messages": TALK, "return_token_strs": 1}, 400, "return_token_strs"),
        ("/tokenize", {"messages": TALK, "continue_final_message": True, "add_generation_prompt": True}, 400, None),
        ("/tokenize", [1], 400, None),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**40]}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**30]}, 400, "tokens"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens"),
        ("/detokenize", {}, 400, "tokens"),
    ],
    ids=range(17),
)
def test_wrong_bodies(path: str, body: Any, status: int, param: str | None, served: Served) -> None:
    found, told = post(served, path, body)
    assert found == status
    if param is not None:
        assert told["error"]["param"] == param


def test_small_routes(served: Served) -> None:
    assert json.loads(served.ask("GET", "/version")[2]) == {"version": __version__}
    assert json.loads(served.ask("GET", "/load")[2]) == {"server_load": 0}
    assert served.ask("GET", "/ping")[0] == 200
