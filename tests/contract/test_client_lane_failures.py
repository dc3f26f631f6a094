"""What fails on the client lane fails alone: silences, unexpected errors, repeats."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from ssd import SamplingParams
from ssd.engine.front import Front
from ssd.errors import PipelineError, RequestError
from ssd.serving.lane import wire
from ssd.serving.lane.client import AsyncClient
from ssd.serving.lane.server import LaneServer
from tests.contract.test_client_lane import PARAMS, run, served


class Pausing:
    """Servers that can stop reading and answering for a while, as a stopped process does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.running = asyncio.Event()
        self.running.set()
        take, send = LaneServer._take, LaneServer._send

        async def paused_take(server: LaneServer, *args: Any) -> None:
            await self.running.wait()
            await take(server, *args)

        async def paused_send(server: LaneServer, *args: Any) -> bool:
            await self.running.wait()
            return await send(server, *args)

        monkeypatch.setattr(LaneServer, "_take", paused_take)
        monkeypatch.setattr(LaneServer, "_send", paused_send)


@pytest.mark.parametrize("silences", [1, 2])
def test_a_client_hears_a_server_again_after_its_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silences: int
) -> None:
    monkeypatch.setattr(wire, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(wire, "SILENT_S", 0.3)
    params = SamplingParams(max_tokens=200, seed=2)

    async def body() -> None:
        pausing = Pausing(monkeypatch)
        async with served(tmp_path, round_s=0.01) as (server, client):
            events = client.stream([6], params)
            got = [await anext(events) for _ in range(3)]
            for _ in range(silences):
                pausing.running.clear()
                before = client._socket
                await server.until(lambda before=before: client._socket is not before)
                await asyncio.sleep(0.4)
                pausing.running.set()
                got.append(await anext(events))
                assert (await client.generate([[2]], PARAMS))[0].token_ids == server.tokens([2], PARAMS)
                assert await client.stats()
            got += [event async for event in events]
            assert tuple(t for e in got for t in e.token_ids) == server.tokens([6], params)

    run(body())


def test_what_a_client_cannot_send_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unsendable = SamplingParams()
    object.__setattr__(unsendable, "top_k", 2**64)

    async def body() -> None:
        async with served(tmp_path) as (server, client):
            for prompt, params in (("\ud800", PARAMS), ([1], unsendable), ([2**31], PARAMS), ([1.5], PARAMS)):
                with pytest.raises(RequestError):
                    await client.generate([prompt], params)  # type: ignore[list-item]
                assert not client._asked
            monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 2000)
            with pytest.raises(RequestError, match="at most 2000"):
                await client.generate([[300] * 2000], PARAMS)
            assert not client._asked
            assert (await client.generate([[2]], PARAMS))[0].token_ids == server.tokens([2], PARAMS)

    run(body())


@pytest.mark.parametrize("error", [TypeError("a bug"), ZeroDivisionError(), KeyError("\ud800")], ids=repr)
def test_a_request_that_fails_unexpectedly_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    make = Front.make

    def failing(front: Front, prompt: Any, *args: Any) -> Any:
        if prompt == [13]:
            raise error
        return make(front, prompt, *args)

    monkeypatch.setattr(Front, "make", failing)

    async def body() -> None:
        async with served(tmp_path, round_s=0.01) as (server, client), AsyncClient(server.lane.endpoint) as other:
            theirs = other.stream([6], SamplingParams(max_tokens=60))
            got = [await anext(theirs)]
            for _ in range(3):
                with pytest.raises(PipelineError, match=rf"internal error \({type(error).__name__}\)"):
                    await client.generate([[13]], PARAMS)
            assert (await client.generate([[2]], PARAMS))[0].token_ids == server.tokens([2], PARAMS)
            got += [event async for event in theirs]
            assert tuple(t for e in got for t in e.token_ids) == server.tokens([6], SamplingParams(max_tokens=60))
            await server.until(lambda: server.engine.running == server.engine.queued == 0)

    run(body())


def test_statistics_that_fail_do_not_stop_the_lane(tmp_path: Path) -> None:
    async def body() -> None:
        async with served(tmp_path) as (server, client):
            server.lane._stats = lambda: 1 / 0  # type: ignore[assignment, return-value]
            events = client.stream([6], PARAMS)
            got = [await anext(events)]
            for _ in range(2):
                with pytest.raises(PipelineError, match="internal error"):
                    await client.stats()
            got += [event async for event in events]
            assert tuple(t for e in got for t in e.token_ids) == server.tokens([6], PARAMS)

    run(body())


def test_repeated_drops_and_credits_change_nothing(tmp_path: Path) -> None:
    """A request's credit never exceeds what the server grants, and dropping one again is harmless."""

    async def body() -> None:
        async with served(tmp_path, round_s=0.02) as (server, client):
            context = zmq.asyncio.Context()
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(server.lane.endpoint)
            await socket.send(wire.encode(wire.Hello()))
            await socket.recv()
            params = SamplingParams(max_tokens=400)
            await socket.send(wire.encode(wire.Ask(number=1, prompt=[1], params=params, credit=1)))
            for _ in range(200):
                await socket.send(wire.encode(wire.Credit(number=1, events=2**40)))
            await server.until(lambda: server.engine.running == 1)
            [credit] = [c for peer in server.lane._clients.values() for c in peer.credit.values()]
            await asyncio.sleep(0.05)
            assert credit.left <= wire.CREDIT
            for _ in range(200):
                await socket.send(wire.encode(wire.Drop(number=1)))
                await socket.send(wire.encode(wire.Drop(number=2)))
            await server.until(lambda: server.engine.running == 0)
            assert not any(peer.credit or peer.tasks for peer in server.lane._clients.values())
            context.destroy(0)
            assert (await client.generate([[2]], PARAMS))[0].token_ids == server.tokens([2], PARAMS)

    run(body())
