"""A request that takes long to prepare holds up no other client."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ssd.engine import front
from ssd.engine.async_engine import COMPILING_THREADS
from ssd.grammars.compiler import Grammars
from ssd.request.sampling_params import SamplingParams
from ssd.testing.twins.served import SOON_S, Served

BLOCKED_S = 5.0
"""Longest that a stand-in blocks its thread. Everybody else must be served within it."""
NAMES = {"type": "string", "enum": [f"name-{number:05}" for number in range(10_000)]}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "names", "schema": NAMES}}
HEAVY: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": "x", "response_format": SCHEMA}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "response_format": SCHEMA}),
    "small": ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "a+"}}),
    "stream": ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "b+"}, "stream": True}),
}


class Blocking:
    """A stand-in that keeps its thread until it may go on."""

    def __init__(self, wrapped: Any):
        self.began, self.go_on = threading.Event(), threading.Event()
        self._wrapped = wrapped

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.began.set()
        self.go_on.wait(BLOCKED_S)
        return self._wrapped(*args, **more)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served(round_s=0.01)
    yield server
    server.close()


def others_are_served(served: Served) -> None:
    """A stream goes on, ``/health`` answers, and another request is answered whole."""
    stream = served.client().completions.create(model="tiny", prompt="a b", max_tokens=200, seed=1, stream=True)
    for count, _ in enumerate(stream):
        if count % 10 == 0:
            assert served.ask("GET", "/health")[0] == 200
    answer = served.client().completions.create(model="tiny", prompt="def", max_tokens=9, seed=4)
    assert answer.choices[0].text == served.text("def", 4, 9)


@pytest.mark.parametrize("kind", HEAVY)
def test_compiling_grammars_holds_up_nobody(served: Served, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = Grammars.matcher
    blocking = Blocking(lambda grammars, wanted: matcher(grammars, wanted))
    monkeypatch.setattr(Grammars, "matcher", lambda *args: blocking(*args))
    path, fields = HEAVY[kind]
    count = COMPILING_THREADS + 2  # more than there are threads for
    with ThreadPoolExecutor(count) as pool:
        body = {"model": "tiny", "max_tokens": 4, **fields}
        heavy = [pool.submit(served.ask, "POST", path, body) for _ in range(count)]
        assert blocking.began.wait(SOON_S)
        others_are_served(served)
        assert not any(one.done() for one in heavy)
        blocking.go_on.set()
        assert [one.result()[0] for one in heavy] == [200] * count


def test_preparing_a_plain_request_holds_up_no_stream(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = front.resolve
    blocking = Blocking(resolve)

    def slow(params: SamplingParams, *rest: Any, **more: Any) -> SamplingParams:
        return (blocking if params.bad_words else resolve)(params, *rest, **more)

    monkeypatch.setattr(front, "resolve", slow)
    with ThreadPoolExecutor(1) as pool:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 4, "bad_words": ["y"]}
        heavy = pool.submit(served.ask, "POST", "/v1/completions", body)
        assert blocking.began.wait(SOON_S)
        others_are_served(served)
        assert not heavy.done()
        blocking.go_on.set()
        assert heavy.result()[0] == 200


def test_a_large_schema_compiles(served: Served) -> None:
    """10,000 alternatives, with the real compiler. The scripted verifier follows no grammar: only that it is taken."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4, "response_format": SCHEMA}
    assert served.ask("POST", "/v1/completions", body)[0] == 200
