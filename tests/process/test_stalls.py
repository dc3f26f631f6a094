"""Requests that are heavy to prepare, one after another beside a stream: the event loop of a real server process is
never kept busy for more than 100 ms. The pipeline is scripted, so only the server's own work counts."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "benchmarks" / "serving"
SOON_S = 120.0
RUN = """
import asyncio, sys
from ssd.config.load import load_config
from ssd.serving.run import serve
from ssd.testing.twins.pipeline import ScriptedPipeline
config = load_config("embedded", ["server.port=0", "engine.max_batch=4", "server.drain_s=0"])
tell = lambda what: print(what, flush=True)
launch = lambda plan: ScriptedPipeline(plan, round_s=0.01)
asyncio.run(serve(config, started=tell, ready=lambda: tell("ready"), launch=launch))
"""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", RUN], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline().rpartition(":")[2])
        assert process.stdout.readline() == "ready\n"
        yield port
    finally:
        process.terminate()
        process.wait(SOON_S)
        process.stdout.close()


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SOON_S)
    connection.request(method, path, body, {"content-type": "application/json"} if body else {})
    answer = connection.getresponse()
    read = answer.status, answer.read()
    connection.close()
    return read


def stalls(port: int) -> int:
    """Returns how often the loop was kept busy for more than 100 ms."""
    text = ask(port, "GET", "/metrics")[1].decode()
    found = dict(re.findall(r'ssd:event_loop_stall_seconds_bucket\{le="([^"]+)"\} (\S+)', text))
    return int(float(found["+Inf"]) - float(found["0.1"]))


def heavy() -> dict[str, tuple[str, bytes]]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        from soak import heavy_requests
    finally:
        sys.path.remove(str(SCRIPTS))
    common: dict[str, Any] = {"model": "embedded", "max_tokens": 4}
    more: dict[str, dict[str, Any] | bytes] = {
        "340,000 ids": {"prompt": [7] * 340_000},
        "texts": {"prompt": ["x"] * 200_000},
        "numbers": {"prompt": "x", "stop_token_ids": [7] * 300_000},
        "bias": {"prompt": "x", "logit_bias": {str(number): 1 for number in range(60_000)}},
        "broken": b"[" + b"1," * 400_000,
        "unknown": {"prompt": "x", "metadata": {str(number): "x" for number in range(60_000)}},
    }
    bodies = {name: b if isinstance(b, bytes) else json.dumps({**common, **b}).encode() for name, b in more.items()}
    return {**heavy_requests("embedded"), **{name: ("/v1/completions", body) for name, body in bodies.items()}}


def test_no_heavy_request_keeps_others_waiting(port: int) -> None:
    over = threading.Event()
    chunks = [0]

    def stream() -> None:
        body = json.dumps({"model": "embedded", "prompt": "x", "max_tokens": 400, "stream": True}).encode()
        while not over.is_set():
            status, text = ask(port, "POST", "/v1/completions", body)
            assert status == 200
            chunks[0] += text.count(b"data: ")

    streaming = threading.Thread(target=stream)
    streaming.start()
    found: dict[str, int] = {}
    try:
        for turn in range(2):  # the first one fills caches and makes garbage
            for name, (path, body) in heavy().items():
                before = stalls(port)
                status, text = ask(port, "POST", path, body)
                assert status in (200, 400, 413), (name, status, text[:300])
                found[f"{name} {turn}"] = stalls(port) - before
    finally:
        over.set()
        streaming.join()
    assert chunks[0] > 100
    assert {name: count for name, count in found.items() if count} == {}
