"""The client lane: one server, clients over ipc and CURVE, and what breaks between them."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgpack
import pytest
import zmq
import zmq.asyncio

from ssd import SamplingParams
from ssd.config.sections import ServerConfig
from ssd.engine.async_engine import AsyncEngine
from ssd.errors import ConfigError, OverloadedError, PipelineError, RequestError, UsageError
from ssd.pipeline.runtime.plan import Plan
from ssd.request.output import StreamEvent
from ssd.request.sampling_params import completion_seed
from ssd.serving.lane import wire
from ssd.serving.lane.client import AsyncClient, Client
from ssd.serving.lane.in_flight import Asked
from ssd.serving.lane.keys import make_keys
from ssd.serving.lane.server import LaneServer
from ssd.testing.twins.pipeline import ScriptedPipeline, scripted_token

SOON_S = 60.0
PARAMS = SamplingParams(max_tokens=30, seed=5)


class Server:
    def __init__(self, endpoint: str, *, round_s: float = 0.002, keys: Path | None = None, max_queue: int = 64):
        self.pipelines: list[ScriptedPipeline] = []

        def launch(plan: Plan) -> ScriptedPipeline:
            self.pipelines.append(ScriptedPipeline(plan, round_s=round_s))
            return self.pipelines[-1]

        self.engine = AsyncEngine(
            "embedded", overrides=["engine.max_batch=2", f"server.max_queue={max_queue}"], launch=launch
        )
        self.config = ServerConfig(lane=endpoint, lane_keys=str(keys) if keys else None)

    async def __aenter__(self) -> Server:
        await self.engine.start()
        self.open()
        return self

    def open(self) -> None:
        self.lane = LaneServer(
            self.engine, self.config, model="tiny", stats=lambda: {"ssd:num_requests_running": self.engine.running}
        )

    async def __aexit__(self, *_exc: object) -> None:
        await self.lane.close()
        await self.engine.close()

    @property
    def pipeline(self) -> ScriptedPipeline:
        return self.pipelines[0]

    def tokens(self, prompt: list[int], params: SamplingParams) -> tuple[int, ...]:
        size = self.engine._front.plan.vocabulary
        return tuple(scripted_token(prompt, params.seed, i, size) for i in range(params.max_tokens))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(SOON_S):
            while not condition():
                await asyncio.sleep(0.01)


@asynccontextmanager
async def served(folder: Path, **options: object) -> AsyncIterator[tuple[Server, AsyncClient]]:
    endpoint = f"ipc://{folder}/lane"
    async with Server(endpoint, **options) as server, AsyncClient(endpoint) as client:  # type: ignore[arg-type]
        yield server, client


def run(body: Awaitable[None]) -> None:
    async def whole() -> None:
        await asyncio.wait_for(body, SOON_S)

    asyncio.run(whole())


def test_streams_and_generates(tmp_path: Path) -> None:
    async def body() -> None:
        async with served(tmp_path) as (server, client):
            assert client.model == "tiny"
            assert stat.S_IMODE(os.stat(tmp_path / "lane").st_mode) & 0o077 == 0  # nobody else may connect
            events = [event async for event in client.stream([4, 9], PARAMS)]
            assert tuple(t for e in events for t in e.token_ids) == server.tokens([4, 9], PARAMS)
            assert {p for e in events for p in e.provenance} <= {"hit", "miss", "bonus", "plain"}
            outputs = await client.generate([[n + 1] for n in range(20)], PARAMS)
            assert [o.token_ids for o in outputs] == [server.tokens([n + 1], PARAMS) for n in range(20)]
            assert outputs[0].speculation.rounds > 0
            async for _ in (stream := client.stream([4], SamplingParams(max_tokens=400))):
                assert await client.stats() == {"ssd:num_requests_running": 1.0}
                break
            await stream.aclose()
        assert not (tmp_path / "lane").exists()

    run(body())


def test_scored_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come with the output. One that is too long for a message is refused, and the client goes on."""
    scored = SamplingParams(max_tokens=0, prompt_logprobs=2)

    async def body() -> None:
        async with served(tmp_path) as (_, client):
            [output] = await client.generate([[4, 9, 11]], scored)
            assert (output.token_ids, output.finish_reason) == ((), "length")
            assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
            assert [(t.token_id, t.logprob, t.rank, t.top) for t in output.prompt_logprobs[1:] if t is not None] == [
                (token, -1.5, 2, ((token + 1, -0.5), (token, -1.5))) for token in (9, 11)
            ]
            monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 4096)
            with pytest.raises(RequestError, match="at most 4096 can be sent: lower prompt_logprobs"):
                await client.generate([list(range(4, 104))], scored)
            assert len((await client.generate([[4, 9, 11]], scored))[0].prompt_logprobs or ()) == 3

    run(body())


def test_completions_and_logprobs(tmp_path: Path) -> None:
    """``n`` > 1 as over ``LLM``: completion i has its own seed, and every one its last event."""
    params = SamplingParams(max_tokens=90, seed=5, n=3, temperature=1.0, logprobs=2, logit_bias={3: 1.5})

    async def body() -> None:
        async with served(tmp_path) as (server, client):
            expected = [
                server.tokens([4, 9], SamplingParams(max_tokens=90, seed=completion_seed(5, index)))
                for index in range(3)
            ]
            events = [event async for event in client.stream([4, 9], params)]
            assert sorted(e.output.index for e in events if e.output is not None) == [0, 1, 2]
            for index, tokens in enumerate(expected):
                mine = [event for event in events if event.index == index]
                assert tuple(token for event in mine for token in event.token_ids) == tokens
                output = mine[-1].output
                assert output is not None and output.token_ids == tokens
                assert output.logprobs == tuple(token for event in mine for token in event.logprobs or ())
                assert [(t.token_id, t.logprob, t.rank) for t in output.logprobs] == [(t, -1.5, 2) for t in tokens]
                assert output.logprobs[0].top == ((tokens[0] + 1, -0.5), (tokens[0], -1.5))
            outputs = await client.generate([[4, 9], [1]], params)
            assert [o.token_ids for o in outputs[0].outputs] == expected
            # More events than credit: giving up while none is left ends it all the same.
            async for _ in (stream := client.stream([4, 9], SamplingParams(max_tokens=400, n=3, temperature=1.0))):
                break
            await stream.aclose()
            await server.until(lambda: server.pipeline.busy == server.engine.running == 0)

    run(body())


@pytest.mark.parametrize(("temperature", "repeats", "goes_on"), [(0, False, True), (1, True, True), (1, False, False)])
def test_what_is_asked_again(temperature: float, repeats: bool, goes_on: bool) -> None:
    """A sampled answer that would come out another way does not go on with other tokens."""
    client = AsyncClient("ipc:///nowhere")
    asked = Asked(0, [1], SamplingParams(temperature=temperature))
    client._asked[0] = asked
    asked.put(StreamEvent(text="a", token_ids=(1,), accepted=0, pieces=("a",), provenance=("bonus",)))
    client._ask_again(repeats)
    assert asked.over is not goes_on and asked.skip.total() == goes_on


def test_the_blocking_client(tmp_path: Path) -> None:
    async def body() -> None:
        endpoint = f"ipc://{tmp_path}/lane"
        async with Server(endpoint) as server:

            def use() -> None:
                with Client(endpoint) as client:
                    [output] = client.generate([[7]], PARAMS)
                    assert output.token_ids == server.tokens([7], PARAMS)
                    events = client.stream([8], SamplingParams(max_tokens=400))
                    next(events)
                    assert client.stats() == {"ssd:num_requests_running": 1}
                    events.close()
                    with pytest.raises(RequestError):
                        client.generate("")
                with pytest.raises(PipelineError, match="closed"):
                    client.generate("x")

            await asyncio.to_thread(use)
            await server.until(lambda: server.pipeline.busy == 0)

    run(body())


@pytest.mark.parametrize("way", ["leave", "close"])
def test_giving_up_frees_the_slot(tmp_path: Path, way: str) -> None:
    async def body() -> None:
        async with served(tmp_path, round_s=0.01) as (server, client):
            events = client.stream([1], SamplingParams(max_tokens=400))
            await anext(events)
            assert server.pipeline.busy == 1
            if way == "leave":
                await events.aclose()  # type: ignore[attr-defined]
            else:
                await client.close()
            await server.until(lambda: server.engine.running == 0 and server.pipeline.busy == 0)

    run(body())


def test_a_vanished_client_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SILENT_S", 0.4)
    monkeypatch.setattr(wire, "HEARTBEAT_S", 0.1)

    async def body() -> None:
        async with served(tmp_path, round_s=0.02) as (server, client):
            await anext(client.stream([1], SamplingParams(max_tokens=400)))
            assert client._beating is not None
            client._beating.cancel()  # no heartbeat, no word
            await server.until(lambda: server.engine.running == 0)

    run(body())


def test_a_slow_reader_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "CREDIT", 3)

    async def body() -> None:
        async with served(tmp_path) as (server, client):
            slow = client.stream([1], SamplingParams(max_tokens=300))
            first = await anext(slow)
            await server.until(lambda: server.pipeline.busy == 0)  # decoded to its end all the same
            [asked] = client._asked.values()
            assert asked.events.qsize() <= 3  # the rest waits at the server
            assert (await client.generate([[2]], PARAMS))[0].token_ids == server.tokens([2], PARAMS)
            rest = [event async for event in slow]
            got = tuple(t for e in [first, *rest] for t in e.token_ids)
            assert got == server.tokens([1], SamplingParams(max_tokens=300))

    run(body())


def test_a_restarted_lane_goes_on_where_it_broke_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HEARTBEAT_S", 0.1)

    async def body() -> None:
        async with served(tmp_path, round_s=0.01) as (server, client):
            params = SamplingParams(max_tokens=120, seed=2)
            events = client.stream([6], params)
            got = [await anext(events) for _ in range(5)]
            await server.lane.close()
            server.open()
            got += [event async for event in events]
            assert tuple(t for e in got for t in e.token_ids) == server.tokens([6], params)
            assert got[-1].output is not None
            assert "".join(e.text for e in got) == got[-1].output.text

    run(body())


def test_a_server_that_stays_away_fails_what_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(wire, "SILENT_S", 0.3)

    async def body() -> None:
        endpoint = f"ipc://{tmp_path}/lane"
        async with Server(endpoint, round_s=0.02) as server, AsyncClient(endpoint, timeout_s=1.0) as client:
            events = client.stream([6], SamplingParams(max_tokens=400))
            await anext(events)
            await server.lane.close()
            with pytest.raises(PipelineError, match="does not answer"):
                async for _ in events:
                    pass
            server.open()

    run(body())


def test_refusals_keep_their_kind(tmp_path: Path) -> None:
    async def body() -> None:
        async with served(tmp_path, max_queue=0, round_s=0.02) as (_, client):
            with pytest.raises(RequestError, match="empty"):
                await client.generate([[]], PARAMS)
            with pytest.raises(RequestError, match="priority is off"):
                await client.generate([[1]], PARAMS, priority=1)
            with pytest.raises(OverloadedError, match="max_queue"):
                await client.generate([[1]] * 6, SamplingParams(max_tokens=400))

    run(body())


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssd.serving.lane.client.CONNECT_S", 0.2)

    async def body() -> None:
        with pytest.raises(PipelineError, match="ssd serve"):
            async with AsyncClient(f"ipc://{tmp_path}/none"):
                pass

    run(body())


def test_garbage_does_not_stop_the_server(tmp_path: Path) -> None:
    async def body() -> None:
        async with served(tmp_path) as (server, client):
            context = zmq.asyncio.Context()
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(f"ipc://{tmp_path}/lane")
            ask = {"type": "Ask", "number": 1, "prompt": "x", "credit": 1, "params": {"temperature": -1}}
            for raw in (b"", b"\xff" * 50, msgpack.packb([1]), msgpack.packb({"type": "Tokens"}), msgpack.packb(ask)):
                await socket.send(raw)
                answer = wire.decode(await socket.recv(), wire.FromServer)
                assert isinstance(answer, wire.Refused) and answer.number == -1
            await socket.send(wire.encode(wire.Ping()))  # without a Hello
            assert isinstance(wire.decode(await socket.recv(), wire.FromServer), wire.Pong)
            context.destroy(0)
            assert (await client.generate([[2]], PARAMS))[0].token_ids == server.tokens([2], PARAMS)

    run(body())


@pytest.mark.skipif(not zmq.has("curve"), reason="this libzmq has no CURVE")
def test_tcp_needs_keys_that_the_server_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssd.serving.lane.client.CONNECT_S", 1.0)
    keys, foreign = tmp_path / "keys", tmp_path / "foreign"
    make_keys(keys, "alice")
    make_keys(foreign, "mallory")
    (foreign / "server.key").write_bytes((keys / "server.key").read_bytes())
    assert stat.S_IMODE((keys / "alice.key_secret").stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="already"):
        make_keys(keys, "alice")
    with pytest.raises(UsageError, match="keys"):
        AsyncClient("tcp://127.0.0.1:9")

    async def body() -> None:
        async with Server("tcp://127.0.0.1:*", keys=keys) as server:
            endpoint = server.lane.endpoint
            async with AsyncClient(endpoint, keys=keys, name="alice") as client:
                assert (await client.generate([[2]], PARAMS))[0].token_ids == server.tokens([2], PARAMS)
            with pytest.raises(PipelineError, match="no server answers"):
                async with AsyncClient(endpoint, keys=foreign, name="mallory"):
                    pass
        for lane, key in (("tcp://127.0.0.1:*", None), ("tcp://*:5555", str(keys)), ("inproc://x", None)):
            with pytest.raises(ConfigError, match=r"server\.lane"):
                LaneServer(server.engine, ServerConfig(lane=lane, lane_keys=key), model="m")

    run(body())
