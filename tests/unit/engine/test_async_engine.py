"""The async engine over a scripted pipeline: concurrency, limits, cancelling, failing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from ssd import SamplingParams
from ssd.engine.async_engine import AsyncEngine
from ssd.engine.book import Limits
from ssd.engine.request import Caller
from ssd.engine.stream import RequestStream
from ssd.errors import OverloadedError, PipelineError, RequestError, WorkerError
from ssd.pipeline.runtime.plan import Plan
from ssd.request.sampling_params import completion_seed
from ssd.request.structured import StructuredOutputsParams
from ssd.testing.twins.pipeline import ScriptedPipeline, scripted_token

LONG = SamplingParams(max_tokens=400)
SOON_S = 60.0


class Bench:
    """An engine and the pipeline under it."""

    def __init__(
        self, *, max_batch: int = 2, limits: Limits | None = None, round_s: float = 0.002, scheduling: str = "fair"
    ):
        self.pipelines: list[ScriptedPipeline] = []

        def launch(plan: Plan) -> ScriptedPipeline:
            self.pipelines.append(ScriptedPipeline(plan, round_s=round_s))
            return self.pipelines[-1]

        overrides = [f"engine.max_batch={max_batch}", f"engine.scheduling={scheduling}"]
        self.engine = AsyncEngine("embedded", overrides=overrides, launch=launch, limits=limits)

    @property
    def pipeline(self) -> ScriptedPipeline:
        return self.pipelines[0]

    def expected(self, prompt: list[int], seed: int, count: int) -> tuple[int, ...]:
        vocabulary = self.engine._front.plan.vocabulary
        return tuple(scripted_token(prompt, seed, position, vocabulary) for position in range(count))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(SOON_S):
            while not condition():
                await asyncio.sleep(0.005)


def run(body: Callable[[Bench], Awaitable[None]], **options: Any) -> None:
    async def whole() -> None:
        bench = Bench(**options)
        async with bench.engine:
            await asyncio.wait_for(body(bench), SOON_S)

    asyncio.run(whole())


def test_many_at_once_each_gets_its_own() -> None:
    async def body(bench: Bench) -> None:
        async def one(number: int) -> None:
            prompt = [number + 1, 5]
            params = SamplingParams(max_tokens=10 + number % 7, seed=number)
            tokens: list[int] = []
            async for event in await bench.engine.open(prompt, params, caller=Caller(client=str(number % 3))):
                tokens += event.token_ids
                if event.output is not None:
                    assert event.output.token_ids == tuple(tokens)
            assert tuple(tokens) == bench.expected(prompt, number, params.max_tokens)

        await asyncio.gather(*(one(number) for number in range(64)))
        assert bench.engine.queued == bench.engine.running == bench.engine.tokens_in_flight == 0
        assert (
            bench.pipeline.most_waiting <= 3
        )  # two slots and one ahead: the others waited here, where clients take turns

    run(body)


@pytest.mark.parametrize("way", ["leave", "task"])
def test_giving_up_frees_the_slot_within_a_round(way: str) -> None:
    async def body(bench: Bench) -> None:
        began = asyncio.Event()

        async def read() -> None:
            async with await bench.engine.open([3], LONG) as stream:
                async for _ in stream:
                    assert bench.engine.running == 1
                    began.set()
                    if way == "leave":
                        return

        reading = asyncio.create_task(read())
        await began.wait()
        if way == "task":
            reading.cancel()
        await asyncio.wait({reading})
        await bench.until(lambda: bench.pipeline.busy == 0 and bench.engine.running == 0)
        assert bench.engine.tokens_in_flight == 0
        output = await bench.engine.generate([4], SamplingParams(max_tokens=3))
        assert output.token_ids == bench.expected([4], 0, 3)

    run(body, max_batch=1)


def test_a_cancelled_request_that_waited() -> None:
    async def body(bench: Bench) -> None:
        streams = [await bench.engine.open([n + 1], LONG) for n in range(4)]
        assert bench.engine.queued == 2  # one slot, one ahead
        streams[3].cancel()
        assert bench.engine.queued == 1
        [last] = [event async for event in streams[3]]
        assert last.output is not None and last.output.finish_reason == "cancelled" and last.token_ids == ()
        bench.engine.cancel_all()
        for stream in streams[:3]:
            assert (await stream.output()).finish_reason == "cancelled"
        assert bench.engine.tokens_in_flight == 0

    run(body, max_batch=1)


def test_taking_no_more() -> None:
    async def body(bench: Bench) -> None:
        stream = await bench.engine.open([4], SamplingParams(max_tokens=20))
        bench.engine.take_no_more("closing time")
        with pytest.raises(PipelineError, match="closing time"):
            await bench.engine.open([4], LONG)
        assert (await stream.output()).finish_reason == "length"

    run(body)


def test_completions() -> None:
    params = SamplingParams(max_tokens=9, seed=2, n=3, temperature=1.0)

    async def body(bench: Bench) -> None:
        output = await bench.engine.generate([4], params)
        expected = [bench.expected([4], completion_seed(2, index), 9) for index in range(3)]
        assert [one.token_ids for one in output.outputs] == expected
        (await bench.engine.open([4], replace(params, max_tokens=300))).cancel()
        await bench.until(lambda: bench.engine.running == bench.engine.queued == bench.pipeline.busy == 0)
        assert not bench.engine._streams

    run(body)


def test_all_completions_or_none() -> None:
    params = SamplingParams(max_tokens=300, n=3, temperature=1.0)

    async def body(bench: Bench) -> None:
        first = await bench.engine.open([4], LONG)
        before = bench.engine.running, bench.engine.queued, bench.engine.tokens_in_flight
        with pytest.raises(OverloadedError, match="max_queue"):
            await bench.engine.open([4], params)
        assert before == (bench.engine.running, bench.engine.queued, bench.engine.tokens_in_flight)
        first.cancel()
        await bench.until(lambda: bench.engine.running == bench.engine.queued == bench.pipeline.busy == 0)
        assert not bench.engine._streams
        (await bench.engine.open([4], params)).cancel()  # there is room now

    run(body, limits=Limits(sent=1, queue=2))


@pytest.mark.parametrize(
    ("last", "error"),
    [
        (([4], replace(LONG, max_tokens=380)), OverloadedError),  # together they exceed the queue
        (([], LONG), RequestError),
        (([4], replace(LONG, structured_outputs=StructuredOutputsParams(regex="("))), RequestError),
        (([4], replace(LONG, method="self")), RequestError),
    ],
    ids=["too many", "empty prompt", "grammar", "method"],
)
def test_several_requests_start_together_or_not_at_all(
    last: tuple[list[int], SamplingParams], error: type[Exception]
) -> None:
    params = SamplingParams(max_tokens=5, seed=1)

    async def body(bench: Bench) -> None:
        first = await bench.engine.open([4], LONG)
        asked = [([4], params), ([5], replace(params, n=2, temperature=1.0)), last]
        before = bench.engine.running, bench.engine.queued, bench.engine.tokens_in_flight
        with pytest.raises(error):
            await bench.engine.open_all(asked)
        assert before == (bench.engine.running, bench.engine.queued, bench.engine.tokens_in_flight)
        assert len(bench.engine._streams) == 1
        streams = await bench.engine.open_all(asked[:2], caller=Caller(label="both"))
        assert [request.label for stream in streams for request in stream.requests] == ["both"] * 3
        first.cancel()
        outputs = [await stream.output() for stream in streams]
        assert [output.token_ids for output in outputs] == [bench.expected([4], 1, 5), bench.expected([5], 1, 5)]
        assert len(outputs[1].outputs) == 2

    run(body, limits=Limits(sent=1, queue=3))


def test_limits() -> None:
    async def body(bench: Bench) -> None:
        kept = [await bench.engine.open([1], LONG) for _ in range(4)]
        with pytest.raises(OverloadedError, match="max_queue"):
            await bench.engine.open([1], LONG)
        kept[0].cancel()
        await bench.until(lambda: bench.engine.queued < 2)
        with pytest.raises(OverloadedError, match="max_tokens_in_flight=1700"):
            await bench.engine.open([1] * 100, LONG)
        kept.append(await bench.engine.open([1], LONG))
        for stream in kept:
            stream.cancel()

    run(body, max_batch=1, limits=Limits(queue=2, tokens=1700, sent=2))


def test_clients_take_turns() -> None:
    async def body(bench: Bench) -> None:
        order: list[str] = []

        async def one(client: str, stream: RequestStream) -> None:
            await stream.output()
            order.append(client)

        asked = ["crowd"] * 20 + ["late"]
        params = SamplingParams(max_tokens=4)
        ahead = [await bench.engine.open([1], LONG) for _ in range(2)]  # one slot, one ahead: the others wait
        streams = [await bench.engine.open([1], params, caller=Caller(client=client)) for client in asked]
        for stream in ahead:
            stream.cancel()
        await asyncio.gather(*map(one, asked, streams))
        assert order.index("late") <= 4  # behind what the verifier had, and one of the crowd

    run(body, max_batch=1)


def test_the_lowest_priority_goes_first() -> None:
    async def body(bench: Bench) -> None:
        order: list[int] = []

        async def one(number: int, stream: RequestStream) -> None:
            output = await stream.output()
            assert output.token_ids == bench.expected([1], number, len(output.token_ids))  # whenever it ran
            order.append(number)

        asked = [(60, 0), (60, 0), (6, 5), (6, 1), (6, -1), (6, 1)]  # the first two find the slot and the place ahead
        streams = [
            await bench.engine.open(
                [1],
                SamplingParams(max_tokens=max_tokens, seed=number),
                caller=Caller(client=str(number), priority=priority),
            )
            for number, (max_tokens, priority) in enumerate(asked)
        ]
        await asyncio.gather(*(one(number, stream) for number, stream in enumerate(streams)))
        assert order == [0, 1, 4, 3, 5, 2]

    run(body, max_batch=1, scheduling="priority", round_s=0.02)


def test_priority_is_off_by_default() -> None:
    async def body(bench: Bench) -> None:
        with pytest.raises(RequestError, match=r"priority is off: .*engine\.scheduling=priority"):
            await bench.engine.open([1], LONG, caller=Caller(priority=1))
        assert (await bench.engine.generate([1], SamplingParams(max_tokens=2))).token_ids

    run(body)


def test_provenance_and_rounds() -> None:
    async def body(bench: Bench) -> None:
        reports = bench.engine.rounds()
        first = asyncio.ensure_future(anext(reports))
        await asyncio.sleep(0)
        events = [e async for e in await bench.engine.open([2], SamplingParams(max_tokens=30, method="ssd"))]
        assert (await first).rows == 1
        await reports.aclose()
        seen = [p for event in events for p in event.provenance]
        assert seen[0] == "plain" and {"bonus"} < set(seen) <= {"plain", "hit", "miss", "bonus"}
        times = [event.committed_s for event in events if event.token_ids]
        assert times == sorted(times) and times[0] > 0
        plain = [e async for e in await bench.engine.open([2], SamplingParams(max_tokens=9, method="none"))]
        assert {p for event in plain for p in event.provenance} == {"plain"}

    run(body)


def test_a_verifier_that_dies_fails_everybody() -> None:
    async def body(bench: Bench) -> None:
        streams = [await bench.engine.open([1], LONG) for _ in range(5)]
        await anext(streams[0])
        bench.pipeline.killed.set()
        for stream in streams:
            with pytest.raises(PipelineError, match="verifier worker died"):
                async for _ in stream:
                    pass
        assert isinstance(await bench.engine.failed(), WorkerError)
        assert not bench.engine.ready
        with pytest.raises(PipelineError):
            await bench.engine.open([1], LONG)

    run(body, round_s=0.05)


def test_losing_the_draft_is_told_and_survived() -> None:
    async def body(bench: Bench) -> None:
        bench.pipeline.lose_draft()
        await bench.engine.generate([1], SamplingParams(max_tokens=3))
        assert bench.engine.degraded == "scripted loss" and bench.engine.ready

    run(body)


def test_before_and_after() -> None:
    async def whole() -> None:
        bench = Bench()
        with pytest.raises(PipelineError, match="not running"):
            await bench.engine.open([1], LONG)
        await bench.engine.start()
        with pytest.raises(RequestError, match="empty"):
            await bench.engine.open("", LONG)
        stream = await bench.engine.open([1], LONG)
        await bench.engine.close()
        with pytest.raises(PipelineError, match="closed"):
            async for _ in stream:
                pass
        await bench.engine.close()
        assert bench.pipeline.check() == ["verifier"]

    asyncio.run(whole())


def test_a_start_given_up_leaves_nothing() -> None:
    async def whole() -> None:
        made: list[ScriptedPipeline] = []

        def slow(plan: Plan) -> ScriptedPipeline:
            made.append(ScriptedPipeline(plan))
            time.sleep(0.2)
            return made[0]

        engine = AsyncEngine("embedded", launch=partial(slow))
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(0.05)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert made[0].check() == ["verifier"]

    asyncio.run(whole())
