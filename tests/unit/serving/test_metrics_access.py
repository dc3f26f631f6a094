"""Who may read ``/metrics``: clients with a key, everybody, or whoever reaches another port."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from ssd.config.load import load_config
from ssd.errors import ConfigError
from ssd.serving.run import serve
from ssd.testing.twins.pipeline import ScriptedPipeline
from ssd.testing.twins.served import Served

SOON_S = 60.0
KEY = "a-key-of-at-least-16"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(KEY)
    return path


def test_open_metrics_need_no_key_and_all_else_does(keys: Path) -> None:
    server = Served(f"server.api_key_file={keys}", "server.metrics=open")
    try:
        status, headers, text = server.ask("GET", "/metrics")
        assert status == 200 and "ssd:num_requests_running" in text
        assert headers["content-type"].startswith("text/plain; version=0.0.4")
        closed = ("/v1/models", "/ssd/info", "/ssd/rounds", "/metrics/", "/METRICS", "//metrics")
        assert {server.ask("GET", path)[0] for path in closed} == {401}
        assert server.ask("GET", "/metrics", headers={"host": "evil.example"})[0] == 421
    finally:
        server.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=SOON_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def answers(*overrides: str, ask: list[tuple[str, str]]) -> list[tuple[int, str]]:
    """Runs ``serve`` and returns status and body for GET requests, each given as (``main`` or a port, path)."""
    config = load_config("embedded", ["server.port=0", *overrides])
    url: asyncio.Queue[str] = asyncio.Queue()
    ready = asyncio.Event()
    serving = asyncio.create_task(serve(config, started=url.put_nowait, ready=ready.set, launch=ScriptedPipeline))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    try:
        if serving.done():
            serving.result()
        main = await url.get()
        urls = [(main if to == "main" else f"http://127.0.0.1:{to}") + path for to, path in ask]
        return [await asyncio.to_thread(get, url) for url in urls]
    finally:
        waiting.cancel()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


def test_a_port_of_its_own(keys: Path) -> None:
    port = free_port()
    asked = [(str(port), "/metrics"), (str(port), "/v1/models"), (str(port), "/"), ("main", "/metrics")]
    settings = (f"server.api_key_file={keys}", f"server.metrics={port}")
    scraped, models, page, main = asyncio.run(answers(*settings, ask=asked))
    assert scraped[0] == 200 and "ssd:num_requests_running" in scraped[1]
    assert (models[0], page[0], main[0]) == (404, 404, 401)
    [main] = asyncio.run(answers(f"server.metrics={port}", ask=[("main", "/metrics")]))
    assert main[0] == 404


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(Exception, match=r"server\.metrics"):
        asyncio.run(answers(f"server.metrics={taken.getsockname()[1]}", ask=[]))


@pytest.mark.parametrize("value", ["closed", "0", "65536", "-1", "true", "1.5", "null", "''"])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.metrics"):
        load_config("embedded", [f"server.metrics={value}"])


@pytest.mark.parametrize(("settings", "expected_s"), [([], 75), (["server.keep_alive_s=7"], 7)], ids=["default", "set"])
def test_connections_are_kept(settings: list[str], expected_s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Config(uvicorn.Config):
        def __init__(self, *args: Any, **more: Any):
            made.append(more)
            super().__init__(*args, **more)

    monkeypatch.setattr(uvicorn, "Config", Config)
    [answer] = asyncio.run(answers(*settings, ask=[("main", "/ready")]))
    assert json.loads(answer[1]) == {"ready": True}
    assert [more["timeout_keep_alive"] for more in made] == [expected_s]
