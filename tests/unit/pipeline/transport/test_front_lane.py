"""Messages may wait a little for later ones, and nothing overtakes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ssd.pipeline.transport.front_lane import TELL_S, FrontLane
from ssd.pipeline.transport.lanes import ControlLane, InprocLane, ZmqLane
from ssd.pipeline.transport.messages import Cancel, Committed, Message, Rejoined

PATIENCE_S = 10.0


@pytest.fixture(params=["inproc", "zmq"])
def lanes(request: pytest.FixtureRequest, tmp_path: object) -> Iterator[tuple[ControlLane, ControlLane]]:
    if request.param == "inproc":
        yield InprocLane.pair()
        return
    one, endpoint = ZmqLane.bind("tcp://127.0.0.1:*")
    other = ZmqLane.connect(endpoint)
    yield one, other
    other.close()
    one.close()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def certain(*numbers: int) -> list[Message]:
    return [Committed(request=number, tokens=[number], accepted=0) for number in numbers]


def heard(lane: ControlLane, count: int) -> list[Message | None]:
    return [*(lane.receive(PATIENCE_S) for _ in range(count)), lane.receive(0.05)]


def test_messages_wait_for_later_ones(lanes: tuple[ControlLane, ControlLane]) -> None:
    clock = Clock()
    teller = FrontLane(lanes[0], clock)
    teller.tell(certain(1, 2), at_once=False)  # the last was sent long ago
    assert heard(lanes[1], 2) == [*certain(1, 2), None]
    for number in (3, 4):
        clock.now += TELL_S / 3
        teller.tell(certain(number), at_once=False)
        assert lanes[1].receive(0.05) is None
    clock.now += TELL_S / 2
    teller.tell(certain(5), at_once=False)
    assert heard(lanes[1], 3) == [*certain(3, 4, 5), None]


def test_awaited_messages_are_sent_at_once(lanes: tuple[ControlLane, ControlLane]) -> None:
    teller = FrontLane(lanes[0], Clock())
    teller.tell(certain(1), at_once=False)
    teller.tell(certain(2), at_once=False)
    teller.tell(certain(3), at_once=True)
    assert heard(lanes[1], 3) == [*certain(1, 2, 3), None]
    teller.tell(certain(4), at_once=False)  # the last was sent just now
    assert lanes[1].receive(0.05) is None


def test_nothing_overtakes_it(lanes: tuple[ControlLane, ControlLane]) -> None:
    teller = FrontLane(lanes[0], Clock())
    for number in (1, 2, 3):
        teller.tell(certain(number), at_once=False)
    teller.send(Rejoined(epoch=1))
    assert heard(lanes[1], 4) == [*certain(1, 2, 3), Rejoined(epoch=1), None]


def test_it_receives_as_the_lane_does(lanes: tuple[ControlLane, ControlLane]) -> None:
    teller = FrontLane(lanes[0], Clock())
    assert teller.receive(0) is None
    lanes[1].send(Cancel(request=1))
    assert teller.receive(PATIENCE_S) == Cancel(request=1)
