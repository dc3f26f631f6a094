"""``ssd serve`` as users start it, on the embedded pair: the same text as plain decoding, many streams
at once, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from ssd import Client, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
BATCH, CONTEXT = 4, 160
START_S = float(os.environ.get("SSD_TEST_START_S", "280"))
"""Seconds to wait for the start; raise it on a busy machine."""
pytestmark = pytest.mark.timeout(900 + START_S)


class Serve:
    """A server process."""

    def __init__(self, folder: Path):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.lane = f"ipc://{folder}/lane"
        self.log = (folder / "log").open("w+")
        overrides = [
            f"engine.max_batch={BATCH}",
            f"engine.max_model_len={CONTEXT}",
            "target.compile=false",
            "draft.compile=false",
            f"server.lane={self.lane}",
        ]
        sets = [part for override in overrides for part in ("--set", override)]
        command = [sys.executable, "-m", "ssd.cli", "serve", "--port", str(self.port), *sets]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stderr=self.log, env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
        )

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return json.loads(answer.read())

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.said
            try:
                if self.get("/ready")["ready"]:
                    return
            except OSError:
                pass
            time.sleep(0.5)
        pytest.fail(f"not ready in {START_S:g} s: {self.said}")

    @property
    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=600)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="st-", dir="/tmp") as name:  # short enough for sockets' names
        yield Path(name)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Serve]:
    serve = Serve(folder)
    try:
        serve.wait()
        yield serve
    finally:
        serve.kill()


def test_speculation_changes_no_text(server: Serve) -> None:
    client = server.client

    def text(method: str, temperature: float) -> str:
        answer = client.completions.create(
            model="embedded",
            prompt="class Stack:\n",
            max_tokens=32,
            temperature=temperature,
            seed=7,
            extra_body={"method": method, "ignore_eos": True},
        )
        spec = answer.model_dump()["metrics"]["speculative_decoding"]
        assert (spec["num_accepted_draft_tokens"] > 0) == (method != "none")
        return answer.choices[0].text

    for temperature in (0.0, 0.9):
        plain = text("none", temperature)
        assert plain and text("sd", temperature) == text("ssd", temperature) == plain


def test_64_streams_at_once(server: Serve) -> None:
    client = server.client

    def one(number: int) -> str:
        method = ("ssd", "sd", "none")[number % 3]
        chunks = client.completions.create(
            model="embedded",
            prompt="def main():\n",
            max_tokens=8,
            temperature=0.8,
            seed=number // 3,
            stream=True,
            extra_body={"method": method, "ignore_eos": True},
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(one, range(63)))
    for group in range(21):  # one seed, three methods, beside any other requests
        assert len(set(texts[3 * group : 3 * group + 3])) == 1
    info = server.get("/ssd/info")
    assert (info["running"], info["queued"], info["degraded"]) == (0, 0, None)


def test_chat_and_the_client_lane(server: Serve) -> None:
    answer = server.client.chat.completions.create(
        model="embedded", messages=[{"role": "user", "content": "import os"}], max_tokens=12, temperature=0
    )
    with Client(server.lane) as client:
        [output] = client.generate("import os\n", SamplingParams(max_tokens=12))
    assert output.text == answer.choices[0].message.content


def test_leaving_in_mid_stream_frees_the_slot(server: Serve) -> None:
    stream = server.client.completions.create(
        model="embedded", prompt="x", max_tokens=CONTEXT - 8, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 30
    while server.get("/ssd/info")["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_leaves_nothing(server: Serve, folder: Path) -> None:
    """Must run last: it stops the server."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) == 2
    with ThreadPoolExecutor(4) as pool:

        def read(seed: int) -> str:
            try:
                stream = server.client.completions.create(
                    model="embedded", prompt="y", max_tokens=CONTEXT - 8, seed=seed, stream=True
                )
                return "".join(chunk.choices[0].text for chunk in stream)
            except openai.OpenAIError as error:
                return type(error).__name__

        reading = [pool.submit(read, seed) for seed in range(8)]
        time.sleep(0.5)
        for child in children:  # as service managers do that signal every process of a service
            child.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        os.kill(server.process.pid, signal.SIGINT)
        assert server.process.wait(60) == 0, server.said
        assert all(isinstance(future.result(60), str) for future in reading)
    assert "stopped" in server.said and "Traceback" not in server.said
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0
    # torch makes a cache folder of its own wherever TMPDIR is.
    left = [path.name for path in folder.iterdir() if not path.name.startswith(("log", "torchinductor"))]
    assert left == []
