"""``ssd serve``: the process that owns a pipeline and serves it over HTTP and the client lane."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from ..config.sections import Config
from ..engine.async_engine import AsyncEngine
from ..errors import SSDError, UsageError
from ..pipeline.runtime.launch import Pipeline, launch_here
from ..pipeline.runtime.plan import Plan
from .app import build_app
from .lane.server import LaneServer
from .metrics import Metrics
from .openai.jobs import model_name
from .shadow import observed_engine

STOPPING = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 3
"""Longest time open connections may take once the server is stopping."""


class Server(uvicorn.Server):
    """Leaves signals to ``serve``, which stops more than connections."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """Stops after open connections end. A second call stops at once."""
        self.force_exit = self.should_exit
        self.should_exit = True


async def serve(
    config: Config,
    *,
    started: Callable[[str], None] = lambda _url: None,
    ready: Callable[[], None] = lambda: None,
    access_log: bool = False,
    launch: Callable[[Plan], Pipeline] = launch_here,
) -> None:
    """Serves until SIGINT or SIGTERM. A second signal stops at once. Workers and sockets are gone afterwards.

    Args:
        started: Called with the URL once the port is bound. The models still load then.
        ready: Called once the models are loaded.
        access_log: Log every HTTP request.
        launch: Makes a running pipeline from a plan.

    Raises:
        UsageError: The configuration is wrong, or an address cannot be bound.
        PipelineError: The workers did not come up, or the pipeline broke.
    """
    metrics = Metrics()
    engine, shadow = observed_engine(config, metrics, launch=launch)
    model = model_name(config)
    app = build_app(engine, metrics, model=model)
    listener = _listen(config.server.host, config.server.port)
    host, port = listener.getsockname()[:2]
    server = Server(
        uvicorn.Config(
            app,
            log_level="info" if access_log else "warning",
            access_log=access_log,
            lifespan="off",
            timeout_graceful_shutdown=GRACE_S,
            server_header=False,
        )
    )
    started(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def stop() -> None:
        server.stop()
        # Open streams end now, and no kept-alive connection can start another request.
        engine.take_no_more("the server is shutting down")
        engine.cancel_all()
        starting.cancel()

    loop = asyncio.get_running_loop()
    for number in STOPPING:
        loop.add_signal_handler(number, stop)
    serving = asyncio.ensure_future(server.serve([listener]))
    starting = asyncio.ensure_future(_start(engine, ready))
    lane: LaneServer | None = None
    try:
        if config.server.lane is not None:
            lane = LaneServer(engine, config.server, model=model, stats=lambda: metrics.values)
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and not starting.cancelled():
            starting.result()
            await _until_over(serving, engine)
        await serving
    finally:
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, SSDError):
            await starting
        server.should_exit = True
        await asyncio.wait({serving})
        listener.close()
        if lane is not None:
            await lane.close()
        await shadow.close()
        await engine.close()
        for number in STOPPING:
            loop.remove_signal_handler(number)


async def _start(engine: AsyncEngine, ready: Callable[[], None]) -> None:
    await engine.start()
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


def _listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket. Raises: UsageError: The address cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen on {host}:{port}: {error}; choose another server.host or server.port"
        ) from None
    listener.listen(1024)
    listener.setblocking(False)
    return listener
