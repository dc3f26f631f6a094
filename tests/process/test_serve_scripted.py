"""The life of a server process, over a scripted pipeline: signals, a bad address, a pipeline that dies."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOON_S = 250.0
RUN = """
import asyncio, sys, threading, time
from ssd.config.load import load_config
from ssd.errors import SSDError
from ssd.serving.run import serve
from ssd.testing.twins.pipeline import ScriptedPipeline
def launch(plan):
    pipeline = ScriptedPipeline(plan, round_s=0.05)
    if "die" in sys.argv:
        threading.Timer(1.0, pipeline.killed.set).start()
    return pipeline
settings = [value for value in sys.argv[3:] if "=" in value]
config = load_config("embedded", ["server.port=" + sys.argv[1], "server.lane=" + sys.argv[2], *settings])
tell = lambda *what: print(*what, flush=True)
hooks = {"started": tell, "ready": lambda: tell("ready"), "draining": lambda count: tell("draining", count)}
try:
    asyncio.run(serve(config, **hooks, launch=launch))
    tell("stopped")
except SSDError as error:
    tell(type(error).__name__, error)
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []
    yield running
    for process in running:
        process.kill()
        process.communicate()


def start(folder: Path, port: int = 0, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(port), f"ipc://{folder}/lane", *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_without_draining_a_signal_ends_streams_and_leaves_nothing(
    number: signal.Signals, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    process = start(tmp_path, 0, "server.drain_s=0")
    started.append(process)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert process.stdout.readline() == "ready\n"
    body = json.dumps({"model": "embedded", "prompt": "x", "max_tokens": 400, "stream": True}).encode()
    asked = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=SOON_S) as answer:
        assert answer.readline().startswith(b"data: ")
        with urllib.request.urlopen(f"{url}/ssd/rounds", timeout=SOON_S) as rounds:
            assert b"forward_s" in rounds.readline()
            began = time.monotonic()
            process.send_signal(number)
            rest = answer.read()
            assert b"shutting down" in rest and rounds.read() is not None
    said, _ = process.communicate(timeout=SOON_S)
    assert said == "stopped\n" and process.returncode == 0
    assert time.monotonic() - began < SOON_S / 2
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0
    assert list(tmp_path.iterdir()) == []


def test_what_ends_it_is_said(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(tmp_path, taken.getsockname()[1])
        started.append(process)
        said, _ = process.communicate(timeout=SOON_S)
        assert said.startswith("UsageError cannot listen on 127.0.0.1:")
    process = start(tmp_path, 0, "die")
    started.append(process)
    said, _ = process.communicate(timeout=SOON_S)
    assert "WorkerError the verifier worker died" in said.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
