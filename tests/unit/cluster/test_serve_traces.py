"""Traces of requests that a Ray Serve replica answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from ssd.cluster import serve_app
from ssd.config.load import load_config
from ssd.request.sampling_params import SamplingParams
from ssd.testing.twins.pipeline import ScriptedPipeline

ENDPOINT = "http://collector.example:4318/v1/traces"


class Recorder:
    """Stands in for ``Tracing``."""

    def __init__(self) -> None:
        self.events, self.closed = 0, False

    def event(self, _request: object, _event: object) -> None:
        self.events += 1

    def round(self, _report: object) -> None: ...

    def draft(self, _news: object) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_a_replica_traces_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, asked = Recorder(), []

    def traces(endpoint: str | None, model: str) -> list[Recorder]:
        asked.append(endpoint)
        return [recorder]

    async def nothing(_metrics: object) -> None:
        return

    monkeypatch.setattr(serve_app, "traces", traces)
    monkeypatch.setattr(serve_app, "publish", nothing)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # restored afterwards
    plain_class: Any = serve_app.Replica.__mro__[1]  # without what needs Serve
    config = load_config("embedded", [f"server.otlp_traces_endpoint={ENDPOINT}"])

    async def run() -> None:
        replica = plain_class(config.model_dump(), ScriptedPipeline)
        await replica.__serve_build_asgi_app__()
        async for _ in await replica.engine.open([1, 2, 3], SamplingParams(max_tokens=2)):
            pass
        await replica.__del__()
        monkeypatch.delattr(plain_class, "__del__")  # Serve awaits it; nobody else does

    asyncio.run(run())
    assert asked == [ENDPOINT] and recorder.events and recorder.closed
