"""The server's end of the client lane: answers ``ssd.Client`` over ZMQ, beside HTTP."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from ...config.sections import ServerConfig
from ...engine.async_engine import AsyncEngine
from ...engine.request import Caller
from ...errors import ConfigError, OverloadedError, PipelineError, RequestError, SSDError, UsageError
from . import wire
from .keys import server_keys

MAX_CLIENTS = 1024
MAX_ASKED = 4096
"""Most requests of one client at once."""

log = logging.getLogger(__name__)


class _Credit:
    """Events that may go out before the client has read more. Never above ``wire.CREDIT``."""

    def __init__(self, events: int):
        self.left = max(1, min(events, wire.CREDIT))
        self._more = asyncio.Event()

    def add(self, events: int) -> None:
        self.left = min(self.left + events, wire.CREDIT)
        self._more.set()

    async def take(self) -> None:
        while not self.left:
            self._more.clear()
            await self._more.wait()
        self.left -= 1


class _Client:
    """One client and its requests by number."""

    def __init__(self) -> None:
        self.heard_s = time.monotonic()
        self.credit: dict[int, _Credit] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def give_up(self, number: int) -> None:
        """Cancels a request, if it is not over."""
        if (task := self.tasks.get(number)) is not None:
            task.cancel()

    def forget(self, number: int) -> None:
        """Removes a request that is over."""
        self.credit.pop(number, None)
        self.tasks.pop(number, None)

    def leave(self) -> list[asyncio.Task[None]]:
        """Cancels all requests. Returns their tasks."""
        tasks = list(self.tasks.values())
        for task in tasks:
            task.cancel()
        return tasks


class LaneServer:
    """Binds ``server.lane`` and answers until closed. Needs a running loop.

    An error of a request becomes that client's ``Refused``; the lane goes on.

    Args:
        model: The model's public name.
        stats: Returns the statistics that clients may ask for.

    Raises:
        ConfigError: Keys are missing for tcp, or the endpoint is of another kind.
        UsageError: The endpoint cannot be bound.
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
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a client that is gone is an error
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
            raise UsageError(f"cannot bind server.lane={endpoint}: {error.strerror}; choose another address") from None
        finally:
            os.umask(before)

    async def close(self) -> None:
        """Cancels all requests of clients, and unbinds."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        answering = [task for client in self._clients.values() for task in client.leave()]
        await asyncio.gather(*answering, return_exceptions=True)
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
            if len(frames) == 2:
                identity, raw = frames
                # An unreadable message does not say which request it is about; -1 is the connection as a whole.
                await self._guarded(identity, -1, self._take(identity, raw))

    async def _guarded(self, identity: bytes, number: int, work: Awaitable[None]) -> None:
        """Awaits work for a client. Whatever it raises is sent to that client as the end of its request."""
        try:
            await work
        except SSDError as error:
            await self._send(identity, wire.refusal(number, error))
        except Exception as error:
            log.exception("a request on the client lane failed")
            text = f"internal error ({type(error).__name__})"
            await self._send(identity, wire.Refused(number=number, kind="PipelineError", message=text))

    async def _take(self, identity: bytes, raw: bytes) -> None:
        message: wire.FromClient = wire.decode(raw, wire.FromClient)
        number = -1 if isinstance(message, wire.Hello | wire.Ping) else message.number
        await self._guarded(identity, number, self._handle(identity, message))

    async def _handle(self, identity: bytes, message: wire.FromClient) -> None:
        client = self._clients.get(identity)
        if client is None:
            if not isinstance(message, wire.Hello):
                # The client knew an earlier server: it greets us once it hears our session.
                await self._send(identity, wire.Pong(session=self.session))
                return
            if len(self._clients) >= MAX_CLIENTS:
                raise OverloadedError(f"{MAX_CLIENTS} clients are connected already; try again later")
            client = self._clients[identity] = _Client()
        client.heard_s = time.monotonic()
        if isinstance(message, wire.Hello):
            await self._send(identity, self._greeting())
        elif isinstance(message, wire.Ping):
            await self._send(identity, wire.Pong(session=self.session))
        elif isinstance(message, wire.AskStats):
            await self._send(identity, wire.Stats(number=message.number, values=dict(self._stats())))
        elif isinstance(message, wire.Credit):
            if (credit := client.credit.get(message.number)) is not None:
                credit.add(message.events)
        elif isinstance(message, wire.Drop):
            client.give_up(message.number)
        elif isinstance(message, wire.Ask):
            self._ask(identity, client, message)

    def _greeting(self) -> wire.Hi:
        return wire.Hi(
            session=self.session,
            model=self._model,
            max_model_len=self._engine.config.engine.max_model_len,
            repeats=self._engine.config.speculation.verify == "coupled",
        )

    def _ask(self, identity: bytes, client: _Client, message: wire.Ask) -> None:
        """Starts the task that answers a request."""
        number = message.number
        if number in client.tasks:
            raise PipelineError(f"request {number} is in flight already")
        if len(client.tasks) >= MAX_ASKED:
            raise OverloadedError(f"{MAX_ASKED} requests of this client are in flight already; try again later")
        client.credit[number] = _Credit(message.credit)
        work = self._guarded(identity, number, self._answer(identity, client.credit[number], message))
        client.tasks[number] = task = asyncio.create_task(work)
        task.add_done_callback(lambda _task: client.forget(number))

    async def _answer(self, identity: bytes, credit: _Credit, message: wire.Ask) -> None:
        caller = Caller(client=f"lane {identity.hex()}", priority=message.priority)
        async with await self._engine.open(message.prompt, message.params, caller=caller) as stream:
            async for event in stream:
                await credit.take()
                kind = wire.Tokens if event.output is None else wire.Done
                if not await self._send(identity, kind(number=message.number, event=event)):
                    return

    async def _send(self, identity: bytes, message: wire.FromServer) -> bool:
        """Returns whether the client is still there. It is sent a refusal in place of a message that is too long."""
        raw = wire.encode(message)
        if len(raw) > wire.MAX_MESSAGE_BYTES and isinstance(message, wire.Tokens | wire.Done):
            told = (
                f"the answer has {len(raw)} bytes; at most {wire.MAX_MESSAGE_BYTES} can be sent: lower prompt_logprobs"
            )
            raw = wire.encode(wire.refusal(message.number, RequestError(told)))
        try:
            await self._socket.send_multipart([identity, raw], zmq.NOBLOCK)
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
