"""``ssd serve``: the process that owns a pipeline and serves it over HTTP and the client lane."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from ..config.sections import Config, ServerConfig
from ..engine.async_engine import AsyncEngine
from ..errors import SSDError, UsageError
from ..pipeline.runtime.launch import Pipeline, launch_here
from ..pipeline.runtime.plan import Plan
from .app import build_app
from .heap import keep_trim, own_heap
from .http.border import App
from .http.state import metrics_app
from .lane.server import LaneServer
from .loop_watch import watch_loop
from .metrics import Metrics
from .openai.jobs import model_name
from .shadow import observed_engine

if TYPE_CHECKING:
    from .tracing import Tracing

STOPPING = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 3
"""Longest time that open connections may take once requests are cut."""
LOOK_S = 0.05
"""Time between two looks at whether all requests are over."""


class Server(uvicorn.Server):
    """Leaves signals to ``serve``, which stops more than connections."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @property
    def answering(self) -> bool:
        """Whether a request has not been answered completely."""
        return bool(self.server_state.tasks)

    def close_idle(self) -> None:
        """Closes connections without a request. The others close after their answer."""
        for connection in list(self.server_state.connections):
            connection.shutdown()

    def stop(self) -> None:
        """Stops after open connections end. A second call stops at once."""
        self.force_exit = self.should_exit
        self.should_exit = True


async def serve(
    config: Config,
    *,
    started: Callable[[str], None] = lambda _url: None,
    ready: Callable[[], None] = lambda: None,
    draining: Callable[[int], None] = lambda _requests: None,
    access_log: bool = False,
    launch: Callable[[Plan], Pipeline] = launch_here,
) -> None:
    """Serves until SIGINT or SIGTERM. Workers and sockets are gone afterwards.

    After the first signal ``/ready`` answers 503, new requests are refused with 503, and running ones may finish
    within ``server.drain_s``. Then, or after a second signal, the rest is cut: streams end with an error event. A
    further signal ends open connections too.

    Args:
        started: Called with the URL once the port is bound. The models still load then.
        ready: Called once the models are loaded.
        draining: Called with the number of running requests when the server waits for them.
        access_log: Log every HTTP request.
        launch: Makes a running pipeline from a plan.

    Raises:
        UsageError: The configuration is wrong, or an address cannot be bound.
        PipelineError: The workers did not come up, or the pipeline broke.
    """
    metrics = Metrics(devices=config.devices)
    model = model_name(config)
    tracing = traces(config.server.otlp_traces_endpoint, model)
    engine, shadow = observed_engine(config, metrics, launch=launch, observers=tracing)
    app = build_app(engine, metrics, model=model)
    listener = _listen(config.server.host, config.server.port, "server.port")
    server = _server(app, config.server, access_log=access_log)
    servings = [(server, listener)]
    if isinstance(config.server.metrics, int):
        scraped = _listen(config.server.host, config.server.metrics, "server.metrics")
        servings.append((_server(metrics_app(metrics, model), config.server, access_log=access_log), scraped))
    host, port = listener.getsockname()[:2]
    started(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in STOPPING:
        loop.add_signal_handler(number, signals.put_nowait, number)

    async def stop() -> None:
        await signals.get()
        engine.take_no_more("the server is shutting down")
        await shadow.close()
        if engine.ready and config.server.drain_s:
            server.close_idle()
            await _drain(server, engine, signals, drain_s=config.server.drain_s, draining=draining)
        engine.cancel_all()
        server.stop()
        await signals.get()
        server.stop()

    serving, *others = [asyncio.ensure_future(one.serve([bound])) for one, bound in servings]
    starting = asyncio.ensure_future(_start(engine, ready))
    stopping = asyncio.ensure_future(stop())
    watching = [asyncio.ensure_future(one) for one in (watch_loop(metrics.stalls.observe), keep_trim(own_heap()))]
    lane: LaneServer | None = None
    try:
        if config.server.lane is not None:
            lane = LaneServer(engine, config.server, model=model, stats=lambda: metrics.values)
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await _until_over(serving, engine)
        await serving
    finally:
        for task in (stopping, *watching):
            task.cancel()
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, SSDError):
            await starting
        for one, _ in servings:
            one.should_exit = True
        await asyncio.wait({serving, *others})
        for _, bound in servings:
            bound.close()
        if lane is not None:
            await lane.close()
        await shadow.close()
        await engine.close()
        for tracer in tracing:
            await asyncio.to_thread(tracer.close)
        for number in STOPPING:
            loop.remove_signal_handler(number)


def traces(endpoint: str | None, model: str) -> list[Tracing]:
    """Returns what traces requests: one observer, or none without an endpoint.

    Raises: UsageError: OpenTelemetry is not installed.
    """
    if endpoint is None:
        return []
    try:
        from .tracing import Tracing

        return [Tracing.to(endpoint, model)]
    except ImportError as error:
        raise UsageError(
            f"server.otlp_traces_endpoint needs OpenTelemetry ({error}): pip install 'ssd-engine[otel]'"
        ) from None


async def _drain(
    server: Server,
    engine: AsyncEngine,
    signals: asyncio.Queue[signal.Signals],
    *,
    drain_s: float,
    draining: Callable[[int], None],
) -> None:
    """Waits until all requests are answered, for ``drain_s`` at most, or until another signal."""

    async def answered() -> None:
        while engine.running or engine.queued:
            await asyncio.sleep(LOOK_S)
        engine.cancel_all()  # ends the streams of round reports, which would go on for ever
        while server.answering:
            await asyncio.sleep(LOOK_S)

    if engine.running or engine.queued:
        draining(engine.running + engine.queued)
    waits = {asyncio.ensure_future(answered()), asyncio.ensure_future(signals.get())}
    try:
        await asyncio.wait(waits, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def _start(engine: AsyncEngine, ready: Callable[[], None]) -> None:
    await engine.start()
    # What libraries made stays for good: looking through it again and again would take a tenth of a second each time.
    gc.collect()
    gc.freeze()
    ready()


async def _until_over(serving: asyncio.Future[None], engine: AsyncEngine) -> None:
    """Waits until the server stops. Raises: PipelineError: The pipeline broke."""
    failed = asyncio.ensure_future(engine.failed())
    try:
        await asyncio.wait({serving, failed}, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            raise failed.result()
    finally:
        failed.cancel()


def _server(app: App | FastAPI, config: ServerConfig, *, access_log: bool) -> Server:
    return Server(
        uvicorn.Config(
            app,
            log_level="info" if access_log else "warning",
            access_log=access_log,
            lifespan="off",
            timeout_keep_alive=config.keep_alive_s,
            timeout_graceful_shutdown=GRACE_S,
            server_header=False,
        )
    )


def _listen(host: str, port: int, key: str) -> socket.socket:
    """Returns a listening socket.

    Args:
        key: The configuration key of the port.

    Raises: UsageError: The address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on {host}:{port}: {error}; choose another server.host or {key}") from None
    listener.listen(1024)
    listener.setblocking(False)
    return listener
