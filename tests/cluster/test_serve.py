"""Ray Serve: replicas answer, recover, and are replaced under load without losing a request."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import pytest

from ssd import LLM, SamplingParams
from ssd.config.load import load_config
from ssd.config.sections import Config
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.testing.twins.pipeline import ScriptedPipeline, scripted_token

pytest.importorskip("ray.serve")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

CPUS = 8
NAME = "ssd"
SOON_S = 300.0


@pytest.fixture(scope="module")
def port(cluster: None) -> Iterator[int]:
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()


@pytest.fixture
def deploy(port: int) -> Iterator[Callable[[Any], None]]:
    from ray import serve

    def run(application: Any) -> None:
        serve.run_many([serve.RunTarget(application, name=NAME)], wait_for_applications_running=False)

    yield run
    serve.delete(NAME)


def scripted(*overrides: str, round_s: float = 0.01) -> tuple[Config, Any]:
    from ssd.cluster.serve_app import deployment

    config = load_config("embedded", ["engine.max_batch=4", *overrides])
    launch = partial(ScriptedPipeline, round_s=round_s)
    return config, deployment(config, launch, min_replicas=2, max_replicas=2, ray_actor_options={"num_cpus": 0.5})


def client(port: int) -> Any:
    import openai

    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=SOON_S)


def states() -> dict[str, int]:
    from ray import serve

    found = serve.status().applications.get(NAME)
    return {} if found is None else dict(found.deployments["Pipeline"].replica_states)


def until(condition: Callable[[], Any], timeout_s: float = SOON_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, states()
        time.sleep(0.1)


def processes(name: str) -> dict[int, psutil.Process]:
    """Returns this cluster's processes of an actor class, by id."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{name}"):
                found[process.pid] = process
        except psutil.NoSuchProcess:
            continue
    return found


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=SOON_S) as answer:
        return answer.read().decode()


def ask(port: int, number: int, *, stream: bool) -> str:
    wanted: dict[str, Any] = {"model": "embedded", "prompt": [5, 6 + number % 50], "max_tokens": 40, "seed": number}
    if not stream:
        return client(port).completions.create(**wanted).choices[0].text
    return "".join(chunk.choices[0].text for chunk in client(port).completions.create(**wanted, stream=True))


class Load:
    """Threads that send one request after another until stopped."""

    def __init__(self, port: int, threads: int):
        self.answers: dict[int, str] = {}
        self.errors: list[Exception] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(port, index)) for index in range(threads)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(SOON_S)
            assert not thread.is_alive()

    def _run(self, port: int, number: int) -> None:
        while not self._over.is_set():
            try:
                self.answers[number] = ask(port, number, stream=bool(number % 2))
            except Exception as error:
                self.errors.append(error)
            number += len(self._threads)


def assert_right(answers: dict[int, str]) -> None:
    from ssd.engine.front import make_plan

    tokenizer, plan = make_plan(load_config("embedded"))
    for number, text in answers.items():
        ids = [scripted_token([5, 6 + number % 50], number, at, plan.vocabulary) for at in range(40)]
        assert text == tokenizer.decode(ids)


def test_replicas_heal_and_roll(port: int, deploy: Callable[[Any], None]) -> None:
    deploy(scripted()[1])
    until(lambda: states().get("RUNNING") == 2)

    # Both answer.
    with Load(port, 12) as load:
        until(lambda: len(load.answers) >= 60)
    assert not load.errors
    assert_right(load.answers)
    counts = {get(port, "/metrics").partition("ssd:generation_tokens_total{")[2][:40] for _ in range(40)}
    assert len(counts) == 2 and "" not in counts

    # One is killed, and comes again; meanwhile the other answers.
    before = processes("ServeReplica:ssd:Pipeline")
    assert len(before) == 2
    os.kill(next(iter(before)), signal.SIGKILL)
    until(lambda: len(processes("ServeReplica:ssd:Pipeline").keys() - before.keys()) == 1)
    until(lambda: states().get("RUNNING") == 2)
    assert ask(port, 1, stream=True)

    # A new version under load.
    with Load(port, 8) as load:
        until(lambda: len(load.answers) >= 16)
        old = processes("ServeReplica:ssd:Pipeline")
        deploy(scripted("engine.max_model_len=480")[1])
        until(lambda: states() == {"RUNNING": 2} and not old.keys() & processes("ServeReplica:ssd:Pipeline").keys())
        count = len(load.answers)
        until(lambda: len(load.answers) >= count + 16)
    assert not load.errors
    assert_right(load.answers)
    assert json.loads(get(port, "/ssd/info"))["engine"]["max_model_len"] == 480


def test_a_pipeline_in_the_replicas_group(
    port: int, deploy: Callable[[Any], None], tiny_config: Callable[..., dict[str, Any]]
) -> None:
    """Real workers: the tokens are plain decoding's; a replica that lost its draft for good, and one that lost
    its verifier, are replaced."""
    from ssd.cluster.serve_app import app

    config = tiny_config(cores=True, engine={"max_batch": 2, "max_model_len": 400, "draft_restarts": 0})
    with LLM(config, launch=InprocPipeline) as llm:
        params = SamplingParams(method="none", max_tokens=30, temperature=0.7, seed=5, ignore_eos=True)
        expected = llm.generate("hello there", params)[0]
    model = load_config(config).target.model.rpartition("/")[2]
    wanted: dict[str, Any] = {"model": model, "prompt": "hello there", "max_tokens": 30, "temperature": 0.7, "seed": 5}

    def answer() -> str:
        created = client(port).completions.create(**wanted, extra_body={"ignore_eos": True, "method": "ssd"})
        return created.choices[0].text

    deploy(app({"config": config}))
    until(lambda: states() == {"RUNNING": 1})
    assert answer() == expected.text
    for _ in range(2):  # draft and verifier, in whichever order
        [replica] = processes("ServeReplica:ssd:Pipeline")
        workers = processes("WorkerActor")
        assert len(workers) == 2
        os.kill(min(workers), signal.SIGKILL)
        until(lambda old=replica: old not in processes("ServeReplica:ssd:Pipeline") and states() == {"RUNNING": 1})
        assert answer() == expected.text
        until(lambda: len(processes("WorkerActor")) == 2)


def test_no_room_is_said(port: int, deploy: Callable[[Any], None]) -> None:
    from launch.ray_serve import wait_until_running
    from ssd.cluster.serve_app import app
    from ssd.errors import WorkerError

    deploy(app({"config": "embedded", "resources": {"draft": {"unobtainable": 1}}}))
    with pytest.raises(WorkerError, match=r"not ready after 35 s: .*unobtainable"):
        wait_until_running(35.0, threading.Event())
