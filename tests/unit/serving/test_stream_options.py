"""What a stream reports beside its text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ssd.testing.twins.served import Served

NEEDED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["x", "y z"]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.close()


def chunks(served: Served, path: str, options: Any) -> list[dict[str, Any]]:
    body = {"model": "tiny", "max_tokens": 12, "n": 2, "seed": 1, "stream": True, "stream_options": options}
    status, _, text = served.ask("POST", path, {**body, **NEEDED[path]})
    assert status == 200, text
    *events, last = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.mark.parametrize("path", NEEDED)
def test_running_usage(served: Served, path: str) -> None:
    """Every chunk has the usage so far, and the last one that of the whole answer."""
    seen = chunks(served, path, {"include_usage": True, "continuous_usage_stats": True})
    usages = [chunk["usage"] for chunk in seen]
    final = usages[-1]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts) and counts[-1] == counts[-2] == final["completion_tokens"] > 0
    assert len(set(counts)) > 3
    for usage in usages:
        assert usage["prompt_tokens"] == final["prompt_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert seen[-1]["choices"] == []


@pytest.mark.parametrize("path", NEEDED)
def test_running_usage_alone_has_no_chunk_of_its_own(served: Served, path: str) -> None:
    seen = chunks(served, path, {"continuous_usage_stats": True})
    assert all(chunk["choices"] and chunk["usage"]["total_tokens"] for chunk in seen)


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_obfuscation": True}], ids=str)
@pytest.mark.parametrize("path", NEEDED)
def test_nothing_else_is_reported(served: Served, path: str, options: Any) -> None:
    assert all(
        "usage" not in chunk and "obfuscation" not in json.dumps(chunk) for chunk in chunks(served, path, options)
    )


@pytest.mark.parametrize("name", ["include_usage", "continuous_usage_stats", "include_obfuscation"])
def test_options_are_booleans_of_a_stream(served: Served, name: str) -> None:
    for change in ({"stream": True, "stream_options": {name: "yes"}}, {"stream_options": {name: True}}):
        status, _, text = served.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2, **change})
        assert (status, json.loads(text)["error"]["param"]) == (400, "stream_options")
    for nothing in ({}, {name: False}, {name: None}):  # asks for nothing, stream or not
        body = {"prompt": "x", "max_tokens": 2, "stream_options": nothing}
        assert served.ask("POST", "/v1/completions", body)[0] == 200
