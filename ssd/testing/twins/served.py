"""A server over a scripted pipeline, in a thread, for tests of clients and pages."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn

from ...config.load import load_config
from ...engine.observing import Observer
from ...pipeline.runtime.launch import Pipeline
from ...pipeline.runtime.plan import Plan
from ...serving.app import build_app
from ...serving.metrics import Metrics
from ...serving.shadow import observed_engine
from .pipeline import ScriptedPipeline, scripted_token

SOON_S = 60.0


class Served:
    """Listens on a free port of loopback until closed.

    Args:
        overrides: of the embedded configuration.
        round_s: duration of a scripted round.
        launch: starts another pipeline than a scripted one.
        config: another configuration than the embedded one.
        observers: of the engine.
    """

    def __init__(
        self,
        *overrides: str,
        round_s: float = 0.002,
        launch: Callable[[Plan], Pipeline] | None = None,
        config: dict[str, Any] | str = "embedded",
        observers: Sequence[Observer] = (),
    ):
        self.pipelines: list[ScriptedPipeline] = []
        self._bound, self._over = threading.Event(), threading.Event()
        self.port, self._overrides, self._round_s = 0, overrides, round_s
        self._launch, self._config, self._observers = launch, config, observers
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._bound.wait(SOON_S)

    async def _serve(self) -> None:
        def launch(plan: Plan) -> ScriptedPipeline:
            self.pipelines.append(ScriptedPipeline(plan, round_s=self._round_s))
            return self.pipelines[-1]

        config = load_config(self._config, ["engine.max_batch=4", *self._overrides])
        metrics = Metrics(devices=config.devices)
        engine, shadow = observed_engine(config, metrics, launch=self._launch or launch, observers=self._observers)
        self.engine = engine
        server = uvicorn.Server(
            uvicorn.Config(build_app(engine, metrics, model="tiny"), log_level="warning", lifespan="off")
        )
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        async with engine:
            serving = asyncio.create_task(server.serve([listener]))
            while not server.started:
                await asyncio.sleep(0.01)
            self._bound.set()
            while not self._over.is_set():
                await asyncio.sleep(0.02)
            server.should_exit = True
            engine.cancel_all()
            await serving
            await shadow.close()

    def close(self) -> None:
        self._over.set()
        self._thread.join(SOON_S)
        assert not self._thread.is_alive()

    @property
    def pipeline(self) -> ScriptedPipeline:
        return self.pipelines[0]

    def client(self, key: str = "none") -> Any:
        """Returns OpenAI's own client, connected to this server."""
        import openai

        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=SOON_S)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], str]:
        """Sends a request and returns status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SOON_S)
        sent = body if isinstance(body, bytes | None) else json.dumps(body)
        kind = {"content-type": "application/json"} if body is not None else {}
        connection.request(method, path, sent, {**kind, **(headers or {})})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, text

    def text(self, prompt: str, seed: int, count: int) -> str:
        """Returns the expected completion of ``count`` tokens."""
        ids = self.engine.tokenize(prompt)
        vocabulary = self.engine._front.plan.vocabulary
        return self.engine.tokenizer.decode([scripted_token(ids, seed, i, vocabulary) for i in range(count)])

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits until the condition holds."""
        deadline = time.monotonic() + SOON_S
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)
