"""A chat field that another front door does not have is refused under the name that the client wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ssd.serving.anthropic import translation as anthropic
from ssd.serving.responses import translation as responses
from ssd.testing.twins.served import Served

VALUES: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "stop": "x", "verbosity": "low"}
DOORS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "/v1/responses": ({"input": "hi", "max_output_tokens": 2}, responses.NAMES),
    "/v1/responses/input_tokens": ({"input": "hi"}, responses.NAMES),
    "/v1/messages": ({"messages": VALUES["messages"], "max_tokens": 2}, anthropic.NAMES),
    "/v1/messages/count_tokens": ({"messages": VALUES["messages"]}, anthropic.NAMES),
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.close()


@pytest.mark.parametrize(
    ("door", "name"), [(door, name) for door, (_, names) in DOORS.items() for name in names], ids=str
)
def test_the_name_is_the_clients(served: Served, door: str, name: str) -> None:
    body = {"model": "tiny", **DOORS[door][0], name: VALUES.get(name, 4)}
    status, _, text = served.ask("POST", door, body)
    assert status == 400 and f"{name} is not a parameter of /v1/" in json.loads(text)["error"]["message"], text


def test_errors_about_values_have_the_doors_name(served: Served) -> None:
    body = {"model": "tiny", "input": "hi", "max_output_tokens": 10**6}
    status, _, text = served.ask("POST", "/v1/responses", body)
    assert (status, json.loads(text)["error"]["param"]) == (400, "max_output_tokens")
