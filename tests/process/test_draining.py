"""How a server stops: readiness first, running requests may finish, a deadline and further signals cut them."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOON_S = 120.0
TOKENS = 300
RUN = """
import asyncio, sys
from ssd.config.load import load_config
from ssd.serving.run import serve
from ssd.testing.twins.pipeline import ScriptedPipeline
class Pipeline(ScriptedPipeline):
    def __init__(self, plan):
        super().__init__(plan, round_s=float(sys.argv[1]))
config = load_config("embedded", ["server.port=0", *sys.argv[2:]])
tell = lambda *what: print(*what, flush=True)
hooks = {"started": tell, "ready": lambda: tell("ready"), "draining": lambda count: tell("draining", count)}
asyncio.run(serve(config, **hooks, launch=Pipeline))
tell("stopped")
"""
STOPPING = [signal.SIGINT, signal.SIGTERM]


class Running:
    """A server process over a scripted pipeline."""

    def __init__(self, round_s: float, *overrides: str):
        command = [sys.executable, "-c", RUN, str(round_s), *overrides]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.port = int(self.line().rpartition(":")[2])
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=SOON_S)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        """Returns the answer, whose body may still be coming."""
        raw = None if body is None else json.dumps({"model": "embedded", "prompt": "x", **body}).encode()
        connection = self.connection()
        connection.request(
            "GET" if raw is None else "POST", path, raw, {"content-type": "application/json", "connection": "close"}
        )
        return connection.getresponse()

    def stream(self) -> http.client.HTTPResponse:
        answer = self.ask("/v1/completions", {"max_tokens": TOKENS, "stream": True, "seed": 1})
        assert answer.readline().startswith(b"data: ")
        return answer

    def wait(self) -> str:
        """Waits for a clean end. Returns what the server said since."""
        said, _ = self.process.communicate(timeout=SOON_S)
        assert self.process.returncode == 0 and said.endswith("stopped\n") and "Traceback" not in said, said
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self.port)) != 0
        return said


@pytest.fixture
def running() -> Iterator[list[Running]]:
    servers: list[Running] = []
    yield servers
    for server in servers:
        server.process.kill()
        server.process.communicate()


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_running_requests_finish(number: signal.Signals, running: list[Running]) -> None:
    server = Running(0.02)
    running.append(server)
    stream, rounds = server.stream(), server.ask("/ssd/rounds")
    whole = server.connection()
    whole.request(
        "POST",
        "/v1/completions",
        json.dumps({"model": "embedded", "prompt": "y", "max_tokens": TOKENS}),
        {"content-type": "application/json"},
    )
    idle = server.connection()
    idle.request("GET", "/health")
    idle.getresponse().read()
    time.sleep(0.2)
    server.process.send_signal(number)
    assert server.line() == "draining 2"
    # The port still listens: probes and clients hear the reason instead of a refused connection.
    ready, health, refused = server.ask("/ready"), server.ask("/health"), server.ask("/v1/completions", {})
    assert (ready.status, health.status, refused.status) == (503, 200, 503)
    assert refused.headers["retry-after"] and b"shutting down" in refused.read()
    assert server.ask("/v1/chat/completions", {"messages": []}).status >= 400
    assert server.ask("/metrics").status == 200
    assert idle.sock is not None and idle.sock.recv(1) == b""  # the next request goes to another server
    rest = stream.read()
    assert rest.endswith(b"data: [DONE]\n\n") and b"shutting down" not in rest
    answer = whole.getresponse()
    assert answer.status == 200 and json.loads(answer.read())["usage"]["completion_tokens"] == TOKENS
    assert rounds.read().count(b"forward_s") > 10
    server.wait()


def test_the_deadline_cuts_what_is_left(running: list[Running]) -> None:
    server = Running(0.3, "server.drain_s=0.5")
    running.append(server)
    stream = server.stream()
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    rest = stream.read()
    assert 0.4 < time.monotonic() - began < SOON_S / 4
    *_, last = [line for line in rest.splitlines() if line]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_unavailable"
    server.wait()


def test_a_second_signal_cuts_at_once(running: list[Running]) -> None:
    server = Running(0.3, "server.drain_s=600")
    running.append(server)
    stream = server.stream()
    server.process.send_signal(signal.SIGTERM)
    assert server.line() == "draining 1"
    began = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    assert b"shutting down" in stream.read()
    server.wait()
    assert time.monotonic() - began < SOON_S / 4


def test_a_client_that_does_not_read_cannot_hold_up_the_end(running: list[Running]) -> None:
    server = Running(0.3, "server.drain_s=600")
    running.append(server)
    streams = [server.stream() for _ in range(3)]
    for _ in range(3):
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    server.wait()
    assert len(streams) == 3


def test_an_idle_server_stops_at_once(running: list[Running]) -> None:
    server = Running(0.02, "server.drain_s=600")
    running.append(server)
    rounds = server.ask("/ssd/rounds")
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == "stopped\n"
    assert time.monotonic() - began < SOON_S / 4 and rounds.read() == b""
