"""What the HTTP server refuses before it reads a request: hosts, origins, kinds, sizes, keys."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from ssd.config.load import load_config
from ssd.errors import ConfigError
from ssd.serving.http.guard import Guard
from ssd.testing.twins.served import Served

KEY = "a-key-of-at-least-16"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.close()


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"host": "evil.example"}, {}, 421),
        ({"origin": "http://evil.example"}, {}, 403),
        ({"origin": "null"}, {}, 403),
        ({"content-type": "text/plain"}, {}, 415),
        ({}, b"{not json", 400),
        ({}, b"[" * 100000, 400),
        ({}, [], 400),
        ({}, b" " * (2**20 + 1), 413),
        ({"transfer-encoding": "chunked"}, b"%x\r\n%s\r\n0\r\n\r\n" % (2**20 + 1, b" " * (2**20 + 1)), 413),
    ],
    ids=["host", "origin", "null origin", "form", "json", "nested", "list", "long", "chunked"],
)
def test_guard(served: Served, headers: dict[str, str], body: Any, status: int) -> None:
    got, _, text = served.ask("POST", "/v1/completions", body, headers)
    assert got == status and "error" in json.loads(text)


def test_own_page_may_call(served: Served) -> None:
    origin = {"origin": f"http://127.0.0.1:{served.port}"}
    assert served.ask("GET", "/v1/models", headers=origin)[0] == 200
    status, headers, text = served.ask("GET", "/")
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text  # works offline
    assert served.ask("GET", "/nothing")[0] == 404


def test_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\nanother-key-0123456\n")
    server = Served(f"server.api_key_file={keys}")
    try:
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong-key-0123456789").models.list()
        assert [m.id for m in server.client(KEY).models.list()] == ["tiny"]
        assert server.ask("GET", "/metrics")[0] == 401
        assert [server.ask("GET", path)[0] for path in ("/", "/health", "/ready")] == [200] * 3
    finally:
        server.close()
    config = load_config("embedded", ["server.host=0.0.0.0"]).server
    with pytest.raises(ConfigError, match="api_key_file"):
        Guard(lambda *_: asyncio.sleep(0), config)  # type: ignore[arg-type, return-value]
    keys.write_text("short")
    with pytest.raises(ConfigError, match="16 characters"):
        Guard(lambda *_: asyncio.sleep(0), config.model_copy(update={"api_key_file": str(keys)}))  # type: ignore
