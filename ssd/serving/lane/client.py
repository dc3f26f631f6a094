"""``ssd.AsyncClient`` and ``ssd.Client``: a server's client lane, from another process or machine.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from ...errors import PipelineError, RequestError, SSDError, UsageError
from ...request import prompts as asked_for
from ...request.output import RequestOutput, StreamEvent
from ...request.prompts import Prompt, Prompts
from ...request.sampling_params import SamplingParams
from . import wire
from .in_flight import Asked
from .keys import client_keys

CONNECT_S = 10.0
Value = TypeVar("Value")


class AsyncClient:
    """A connection to ``ssd serve`` with a ``server.lane``.

    ::

        async with AsyncClient("ipc:///run/user/1000/ssd.sock") as client:
            async for event in client.stream("def main():", SamplingParams(max_tokens=32)):
                print(event.text)

    After a silence of the server the client connects again and sends its requests again. Their tokens continue where
    they stopped, because they are a function of prompt and parameters.

    Args:
        endpoint: ``ipc://PATH`` or ``tcp://HOST:PORT``.
        keys: For tcp: folder with ``server.key`` and ``NAME.key_secret``.
        name: For tcp: the client's name in that folder.
        timeout_s: How long a server may be silent before the requests in flight fail.
        reconnect: False fails them as soon as the connection is considered lost.

    Raises:
        UsageError: The endpoint is of another kind, or tcp without keys.
        PipelineError (entering): No server answers in time.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        keys: str | Path | None = None,
        name: str = "client",
        timeout_s: float = 60.0,
        reconnect: bool = True,
    ):
        if not endpoint.startswith(("ipc://", "tcp://")):
            raise UsageError(f"{endpoint!r} must look like ipc://PATH or tcp://HOST:PORT")
        if endpoint.startswith("tcp://") and keys is None:
            raise UsageError("a tcp lane needs keys: make them with `ssd lane-keys FOLDER NAME` on the server")
        self._endpoint, self._timeout_s, self._reconnect = endpoint, timeout_s, reconnect
        self._keys = client_keys(Path(keys).expanduser(), name) if keys is not None else None
        self._numbers = itertools.count()
        self._asked: dict[int, Asked] = {}
        self._stats: dict[int, asyncio.Future[dict[str, float]]] = {}
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._listening: asyncio.Task[None] | None = None
        """Reads the current socket."""
        self._beating: asyncio.Task[None] | None = None
        self._greeted = asyncio.Event()
        self._session: str | None = None
        self._heard_s = self._answered_s = 0.0
        self.model = ""
        """The model's public name, once connected."""

    async def __aenter__(self) -> AsyncClient:
        self._context = zmq.asyncio.Context()
        self._connect()
        self._beating = asyncio.create_task(self._beat())
        try:
            await asyncio.wait_for(self._greeted.wait(), min(CONNECT_S, self._timeout_s))
        except BaseException as error:
            await self.close()
            if isinstance(error, TimeoutError):
                raise PipelineError(f"no server answers at {self._endpoint}; is `ssd serve` running?") from None
            raise
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels the requests in flight and disconnects. Safe to call twice."""
        for number, asked in list(self._asked.items()):
            if not asked.over:
                self._send(wire.Drop(number=number))
            asked.fail(PipelineError("the client is closed"))
        tasks = [task for task in (self._listening, self._beating) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listening = self._beating = None
        if self._socket is not None:
            self._socket.close(200)
            self._socket = None
        if self._context is not None:
            self._context.term()
            self._context = None

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncGenerator[StreamEvent, None]:
        """As ``LLM.stream``; ``priority`` as for ``AsyncEngine.open``. Closing the iterator cancels the request.

        Raises: RequestError, OverloadedError: The request is refused. PipelineError: The server is gone.
        """
        if self._socket is None:
            raise PipelineError("the client is not connected; use `async with`")
        asked = Asked(next(self._numbers), *asked_for.one(prompt, params), priority)
        message = _encoded(asked.message)
        self._asked[asked.number] = asked
        if self._session is not None:  # otherwise the server's greeting sends it, like all that is in flight
            self._send(message)
        left = asked.params.n
        try:
            while left:
                event = await asked.events.get()
                if isinstance(event, SSDError):
                    raise event
                left -= event.output is not None
                if left:
                    self._send(wire.Credit(number=asked.number, events=1))
                yield event
        finally:
            del self._asked[asked.number]
            if not asked.over:
                self._send(wire.Drop(number=asked.number))

    async def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """As ``LLM.generate``; ``priority`` as for ``stream``."""
        pairs = asked_for.pair(prompts, params)

        async def complete(prompt: Prompt, own: SamplingParams) -> RequestOutput:
            async with contextlib.aclosing(self.stream(prompt, own, priority=priority)) as events:
                return RequestOutput.joined([event.output async for event in events if event.output is not None])

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(complete(*pair)) for pair in pairs]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def stats(self) -> dict[str, float]:
        """Returns the server's counters and gauges, by their names at ``/metrics``.

        Raises: PipelineError: The server does not answer in time.
        """
        if self._socket is None:
            raise PipelineError("the client is not connected; use `async with`")
        number = next(self._numbers)
        told = self._stats[number] = asyncio.get_running_loop().create_future()
        self._send(wire.AskStats(number=number))
        try:
            return await asyncio.wait_for(told, min(CONNECT_S, self._timeout_s))
        except TimeoutError:
            raise PipelineError(f"the server at {self._endpoint} does not answer") from None
        finally:
            del self._stats[number]

    def _connect(self) -> None:
        """Opens a new socket, and reads it. To the server it is a new client."""
        assert self._context is not None
        if self._listening is not None:
            self._listening.cancel()
        if self._socket is not None:
            self._socket.close(0)
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.LINGER, 200)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        if self._keys is not None:
            socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = self._keys
        socket.connect(self._endpoint)
        self._socket, self._session = socket, None
        self._heard_s = time.monotonic()
        self._answered_s = self._answered_s or self._heard_s
        self._listening = asyncio.create_task(self._listen(socket))
        self._send(wire.Hello())

    def _send(self, message: wire.FromClient | bytes) -> None:
        if self._socket is not None:
            sent: Any = self._socket.send(message if isinstance(message, bytes) else wire.encode(message), zmq.NOBLOCK)
            # A failed send needs no handling: a server that reads nothing is soon considered silent.
            sent.add_done_callback(lambda future: future.cancelled() or future.exception())

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            raw = await socket.recv()
            try:
                message = wire.decode(raw, wire.FromServer)
            except SSDError as error:
                self._fail_all(error)
                continue
            self._heard_s = self._answered_s = time.monotonic()
            self._take(message)

    def _take(self, message: wire.FromServer) -> None:
        if isinstance(message, wire.Hi):
            if message.version != wire.VERSION:
                self._fail_all(PipelineError(f"the server speaks version {message.version}, we {wire.VERSION}"))
                return
            self.model, first = message.model, self._session is None and not self._greeted.is_set()
            self._session = message.session
            self._greeted.set()
            if not first:
                self._ask_again(message.repeats)
        elif isinstance(message, wire.Pong):
            if self._session is not None and message.session != self._session:
                self._session = None
                self._send(wire.Hello())  # the server has restarted and does not know us
        elif isinstance(message, wire.Stats):
            if (told := self._stats.get(message.number)) is not None and not told.done():
                told.set_result(message.values)
        elif isinstance(message, wire.Refused):
            if message.number < 0:
                self._fail_all(wire.raised(message))
            elif (asked := self._asked.get(message.number)) is not None:
                asked.fail(wire.raised(message))
            elif (told := self._stats.get(message.number)) is not None and not told.done():
                told.set_exception(wire.raised(message))
        elif (asked := self._asked.get(message.number)) is not None and not asked.over:
            asked.put(message.event)

    def _ask_again(self, repeats: bool) -> None:
        for asked in self._asked.values():
            if not asked.over:
                broken_off = asked.received.total() > 0 and asked.params.temperature > 0
                if self._reconnect and (repeats or not broken_off):
                    asked.skip = asked.received.copy()
                    self._send(asked.message)
                else:
                    asked.fail(PipelineError("the server was restarted; the request is lost"))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(wire.HEARTBEAT_S)
            now = time.monotonic()
            if now - self._answered_s > self._timeout_s or (
                not self._reconnect and now - self._answered_s > wire.SILENT_S
            ):
                self._fail_all(PipelineError(f"the server at {self._endpoint} does not answer any more"))
            if now - self._heard_s > wire.SILENT_S:
                self._connect()
            else:
                self._send(wire.Ping())

    def _fail_all(self, error: SSDError) -> None:
        for asked in self._asked.values():
            asked.fail(error)


def _encoded(ask: wire.Ask) -> bytes:
    """Returns a request as bytes. Raises: RequestError: A value cannot be encoded, or the message is too large."""
    try:
        raw = wire.encode(ask)
    except (OverflowError, TypeError, ValueError) as error:
        raise RequestError(f"the request cannot be sent: {' '.join(str(error).split())}") from error
    if len(raw) > wire.MAX_MESSAGE_BYTES:
        raise RequestError(f"the request has {len(raw)} bytes; at most {wire.MAX_MESSAGE_BYTES} can be sent")
    return raw


class Client:
    """``AsyncClient`` for programs without a loop: a background thread holds the connection.

    ::

        with Client("ipc:///run/user/1000/ssd.sock") as client:
            print(client.generate("def main():")[0].text)

    Args, raises: As ``AsyncClient``.
    """

    def __init__(self, endpoint: str, **options: Any):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ssd-client", daemon=True)
        self._thread.start()
        try:
            self._client: AsyncClient | None = self._run(self._open(endpoint, options))
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def model(self) -> str:
        """The model's public name."""
        return self._client.model if self._client is not None else ""

    def close(self) -> None:
        """Disconnects. Safe to call twice."""
        client, self._client = self._client, None
        if client is not None:
            self._run(client.close())
            self._stop()

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """As ``LLM.generate``; ``priority`` as for ``stream``."""
        return self._run(self._connected().generate(prompts, params, priority=priority))

    def stats(self) -> dict[str, float]:
        """As ``AsyncClient.stats``."""
        return self._run(self._connected().stats())

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> Iterator[StreamEvent]:
        """As ``LLM.stream``; ``priority`` as for ``AsyncEngine.open``. Closing the iterator cancels the request."""
        events = self._connected().stream(prompt, params, priority=priority)
        try:
            while True:
                try:
                    yield self._run(anext(events))  # pyright: ignore[reportArgumentType]
                except StopAsyncIteration:
                    return
        finally:
            if self._client is not None:
                self._run(events.aclose())

    async def _open(self, endpoint: str, options: dict[str, Any]) -> AsyncClient:
        return await AsyncClient(endpoint, **options).__aenter__()

    def _connected(self) -> AsyncClient:
        if self._client is None:
            raise PipelineError("this client is closed")
        return self._client

    def _run(self, awaited: Coroutine[Any, Any, Value]) -> Value:
        async def whole() -> Value:
            return await awaited

        future = asyncio.run_coroutine_threadsafe(whole(), self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
