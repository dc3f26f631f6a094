"""The server's end of the client lane: ``ssd.Client`` over ZMQ, beside HTTP."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from ...config.sections import ServerConfig
from ...engine.async_engine import AsyncEngine
from ...engine.stream import RequestStream
from ...errors import ConfigError, PipelineError, SSDError, UsageError
from ..http.guard import is_loopback
from . import wire
from .keys import server_keys

MAX_CLIENTS = 1024
MAX_ASKED = 4096
"""Requests of one client at once."""


class _Client:
    """One peer: what it has asked for."""

    def __init__(self) -> None:
        self.heard_s = time.monotonic()
        self.streams: dict[int, RequestStream] = {}
        self.credit: dict[int, asyncio.Semaphore] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def forget(self, number: int) -> None:
        self.streams.pop(number, None)
        self.credit.pop(number, None)

    def leave(self) -> None:
        for task in self.tasks:
            task.cancel()


class LaneServer:
    """Binds ``server.lane`` and answers until closed.

    Args:
        stats: what clients get who ask for statistics.

    Raises:
        ConfigError: no keys for tcp, or an endpoint of another kind.
        UsageError: the endpoint cannot be bound.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        config: ServerConfig,
        *,
        model: str,
        stats: Callable[[], Mapping[str, float]] = dict,
    ):
        assert config.lane is not None
        self._engine, self._model, self._stats, self.session = engine, model, stats, uuid.uuid4().hex
        self._clients: dict[bytes, _Client] = {}
        self._context = zmq.asyncio.Context()
        self._authenticator: AsyncioAuthenticator | None = None
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            self._bind(config.lane, config.lane_keys)
        except BaseException:
            self._socket.close(0)
            self._stop_authenticator()
            self._context.term()
            raise
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._tasks = [asyncio.create_task(self._serve()), asyncio.create_task(self._forget_silent())]

    def _bind(self, endpoint: str, keys: str | None) -> None:
        socket = self._socket
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a client that is gone is an error, not a silence
        socket.setsockopt(zmq.SNDHWM, 4096)
        socket.setsockopt(zmq.LINGER, 200)
        kind, _, rest = endpoint.partition("://")
        if kind == "tcp":
            if keys is None:
                raise ConfigError(
                    f"server.lane={endpoint} is reachable by others; make keys with `ssd lane-keys FOLDER NAME` and "
                    "set server.lane_keys=FOLDER, or use ipc://PATH"
                )
            if rest.startswith(("*", "0.0.0.0")):
                raise ConfigError("server.lane must name one address, not every interface")
            folder = Path(keys).expanduser()
            socket.curve_publickey, socket.curve_secretkey = server_keys(folder)
            socket.curve_server = True
            self._authenticator = authenticator = AsyncioAuthenticator(self._context)
            authenticator.start()
            authenticator.configure_curve(domain="*", location=str(folder / "clients"))
        elif kind != "ipc" or not rest:
            raise ConfigError(f"server.lane={endpoint} must look like ipc:///path/of/a/socket or tcp://host:port")
        before = os.umask(0o177)  # only this user may connect
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            hint = "" if kind == "ipc" or is_loopback(rest.rpartition(":")[0]) else " on this machine"
            raise UsageError(f"cannot bind server.lane={endpoint}{hint}: {error.strerror}") from None
        finally:
            os.umask(before)

    async def close(self) -> None:
        """Give up what clients asked for, and unbind."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        mine = [task for client in self._clients.values() for task in client.tasks]
        for client in self._clients.values():
            client.leave()
        await asyncio.gather(*mine, return_exceptions=True)
        path = self.endpoint.removeprefix("ipc://")
        self._socket.close()
        self._stop_authenticator()
        self._context.term()
        if path != self.endpoint:
            Path(path).unlink(missing_ok=True)

    def _stop_authenticator(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None

    async def _serve(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            if len(frames) != 2:
                continue
            identity, raw = frames
            try:
                message = wire.decode(raw, wire.FromClient)
            except SSDError as error:
                # Whose request it was may be unreadable; number -1 is the connection as a whole.
                await self._send(identity, wire.refusal(-1, error))
                continue
            await self._take(identity, message)

    async def _take(self, identity: bytes, message: wire.FromClient) -> None:
        client = self._clients.get(identity)
        if client is None:
            if not isinstance(message, wire.Hello):
                # From a life before this one: it will ask again once it hears our session.
                await self._send(identity, wire.Pong(session=self.session))
                return
            if len(self._clients) >= MAX_CLIENTS:
                await self._send(identity, wire.Refused(number=-1, kind="OverloadedError", message="too many clients"))
                return
            client = self._clients[identity] = _Client()
        client.heard_s = time.monotonic()
        if isinstance(message, wire.Hello):
            await self._send(
                identity,
                wire.Hi(
                    session=self.session,
                    model=self._model,
                    max_model_len=self._engine.config.engine.max_model_len,
                    repeats=self._engine.config.speculation.verify == "coupled",
                ),
            )
        elif isinstance(message, wire.Ping):
            await self._send(identity, wire.Pong(session=self.session))
        elif isinstance(message, wire.AskStats):
            await self._send(identity, wire.Stats(number=message.number, values=dict(self._stats())))
        elif isinstance(message, wire.Credit):
            if (credit := client.credit.get(message.number)) is not None:
                for _ in range(min(message.events, wire.CREDIT)):
                    credit.release()
        elif isinstance(message, wire.Drop):
            if (stream := client.streams.get(message.number)) is not None:
                stream.cancel()
                for _ in stream.requests:
                    client.credit[message.number].release()  # the last events may go out
        elif isinstance(message, wire.Ask):
            await self._ask(identity, client, message)

    async def _ask(self, identity: bytes, client: _Client, message: wire.Ask) -> None:
        number = message.number
        try:
            if number in client.streams or len(client.streams) >= MAX_ASKED:
                raise PipelineError(f"request {number} cannot be asked for: in use, or too many at once")
            name = f"lane {identity.hex()}"
            stream = self._engine.submit(message.prompt, message.params, client=name, priority=message.priority)
        except SSDError as error:
            await self._send(identity, wire.refusal(number, error))
            return
        client.streams[number] = stream
        client.credit[number] = asyncio.Semaphore(max(1, min(message.credit, wire.CREDIT)))
        task = asyncio.create_task(self._answer(identity, client, number, stream, client.credit[number]))
        client.tasks.add(task)
        task.add_done_callback(client.tasks.discard)

    async def _answer(
        self, identity: bytes, client: _Client, number: int, stream: RequestStream, credit: asyncio.Semaphore
    ) -> None:
        async with stream:
            try:
                async for event in stream:
                    await credit.acquire()
                    kind = wire.Tokens if event.output is None else wire.Done
                    if not await self._send(identity, kind(number=number, event=event)):
                        return
            except SSDError as error:
                await self._send(identity, wire.refusal(number, error))
            finally:
                client.forget(number)

    async def _send(self, identity: bytes, message: wire.FromServer) -> bool:
        """False if the client is not there any more."""
        try:
            await self._socket.send_multipart([identity, wire.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            self._leave(identity)
            return False
        return True

    def _leave(self, identity: bytes) -> None:
        client = self._clients.pop(identity, None)
        if client is not None:
            client.leave()

    async def _forget_silent(self) -> None:
        while True:
            await asyncio.sleep(wire.HEARTBEAT_S)
            late = time.monotonic() - wire.SILENT_S
            for identity in [i for i, client in self._clients.items() if client.heard_s < late]:
                self._leave(identity)
