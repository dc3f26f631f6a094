"""A control lane read by a loop: nothing is missed, whatever lies there already and whoever sends when."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from ssd.errors import PipelineError
from ssd.pipeline.transport.async_lane import AsyncLane
from ssd.pipeline.transport.lanes import ControlLane, InprocLane, ZmqLane
from ssd.pipeline.transport.messages import Cancel, Message

COUNT = 3000


def pair(kind: str, folder: Path) -> tuple[ControlLane, ControlLane]:
    if kind == "inproc":
        return InprocLane.pair()
    ours, endpoint = ZmqLane.bind(f"ipc://{folder}/lane")
    return ours, ZmqLane.connect(endpoint)


@pytest.mark.parametrize("kind", ["inproc", "zmq"])
def test_all_arrive_in_order(kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(kind, tmp_path)

    def other_side() -> None:
        for number in range(COUNT // 2):  # before anybody looks
            theirs.send(Cancel(request=number))
        began.set()
        for number in range(COUNT // 2, COUNT):
            theirs.send(Cancel(request=number))
            if number % 10 == 0:  # an answer for each tenth: sending must not hide what came
                assert theirs.receive(30.0) is not None

    async def body() -> None:
        await asyncio.to_thread(began.wait)
        got: list[int] = []
        over = asyncio.Event()

        def take(message: Message) -> None:
            assert isinstance(message, Cancel)
            got.append(message.request)
            if message.request >= COUNT // 2 and message.request % 10 == 0:
                lane.send(Cancel(request=0))
            if len(got) == COUNT:
                over.set()

        lane = AsyncLane(ours, take, lambda error: pytest.fail(str(error)))
        await asyncio.wait_for(over.wait(), 120)
        assert got == list(range(COUNT))
        await lane.close()
        theirs.send(Cancel(request=9))
        await asyncio.sleep(0.1)
        assert len(got) == COUNT  # closed is closed

    began = threading.Event()
    thread = threading.Thread(target=other_side)
    thread.start()
    asyncio.run(body())
    thread.join()
    ours.close()
    theirs.close()


@pytest.mark.parametrize("kind", ["inproc", "zmq"])
def test_garbage_breaks_it_once(kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(kind, tmp_path)

    async def body() -> None:
        errors: list[PipelineError] = []
        lane = AsyncLane(ours, lambda _: None, errors.append)
        for _ in range(2):
            if isinstance(theirs, ZmqLane):
                theirs._socket.send(b"\xff")
            else:
                theirs._outbox.put(b"\xff")  # type: ignore[attr-defined]
        async with asyncio.timeout(60):
            while not errors:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert len(errors) == 1 and "not a message of the control lane" in str(errors[0])
        await lane.close()

    asyncio.run(body())
    ours.close()
    theirs.close()


def test_nobody_at_the_other_end(tmp_path: Path) -> None:
    ours, _ = ZmqLane.bind(f"ipc://{tmp_path}/lane")

    async def body() -> None:
        lane = AsyncLane(ours, lambda _: None, lambda _: None)
        with pytest.raises(PipelineError, match="nobody"):
            lane.send(Cancel(request=1))  # at once: the loop must not wait
        await lane.close()

    asyncio.run(body())
    ours.close()
