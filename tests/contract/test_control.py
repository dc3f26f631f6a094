"""Control lanes: every message arrives as it was, in order, and nothing else is taken in."""

from __future__ import annotations

import ast
import pickle
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import zmq

from ssd.errors import PipelineError
from ssd.pipeline.round.frames import Next, OutcomeFrame
from ssd.pipeline.transport import codec, messages
from ssd.pipeline.transport import lanes as control
from ssd.pipeline.transport.lanes import ControlLane, InprocLane, ZmqLane
from ssd.pipeline.transport.messages import (
    Admit,
    Bell,
    Cancel,
    Committed,
    Copy,
    Decided,
    Decode,
    Failed,
    Finished,
    GetTimings,
    Hello,
    Keep,
    Message,
    Prefill,
    Prepare,
    Ready,
    Rejoined,
    Reopen,
    RoundReport,
    Scored,
    Shutdown,
    Submit,
    Timings,
    Watch,
    Welcome,
    decode,
    encode,
)
from ssd.request.output import SpeculationRecord
from ssd.request.sampling_params import SamplingParams

PARAMS = SamplingParams(
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.1,
    max_tokens=3,
    seed=2**63 - 1,
    stop=("é", "🐍"),
    stop_token_ids=(1, 2),
    ignore_eos=True,
    method="sd",
    repetition_penalty=1.2,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    logit_bias={7: -100.0, 3: 2.5},
    bad_words=("é", (4, 5), (6,)),
    allowed_token_ids=(1, 2, 3),
    min_tokens=2,
    n=3,
    include_stop_str_in_output=True,
    skip_special_tokens=False,
    logprobs=2,
    prompt_logprobs=3,
)
RECORD = SpeculationRecord(rounds=3, tokens=7, drafted=9, accepted=4, lookups=3, hits=2, accepted_histogram=[1, 0, 2])
EVERY: list[Message] = [
    Submit(request=2**40, prompt=[1, 2, 3], params=PARAMS),
    Submit(request=0, prompt=[], params=SamplingParams()),
    Cancel(request=7),
    Decode(plan="verify", context=256, tokens=[[1, -1], [2, 3]], lengths=[7, 0]),
    Prefill(slot=1, tokens=[4, 5], start=64, logits=False),
    Prefill(slot=1, tokens=[4, 5], start=64, logits=True),
    Copy(source=0, slot=1, length=64),
    Keep(slots=[0], scratch=[2], positions=[9]),
    Bell(round=3),
    Prepare(round=3, trees=[[1, -1], [2, 3]]),
    Decided(
        outcome=OutcomeFrame(
            round=3, control_count=1, next=Next.IDLE, ngram=True, lookahead=3, states=[1, 0], nodes=[2, 0], bonus=[7, 0]
        )
    ),
    Admit(slot=1, tokens=list(range(5000)), params=PARAMS, forecasts=True),
    Admit(slot=0, tokens=[1, 2, 3], params=PARAMS, forecasts=False, prompt_length=2, ends=[0, 7]),
    Shutdown(),
    GetTimings(reset=True),
    Timings(round_ms=1.5, hit_round_ms=None, forward_ms=0.25, draft_ms=None),
    Scored(request=3, logprobs=[[-0.5, -9.25], [1, 40], [[4, 5], [6, 7]], [[-0.5, -1.0], [-0.25, -0.75]]]),
    Committed(request=3, tokens=[9, 8], accepted=1),
    Watch(on=True),
    RoundReport(
        began_s=1.5, forward_s=0.1, wait_s=None, draft_s=0.2, jit_s=None, round_s=0.3, rows=2, lookups=2, hits=1
    ),
    Committed(
        request=3,
        tokens=[9, 8],
        accepted=1,
        depth=1,
        drafted=4,
        hit=False,
        origin="miss",
        committed_s=7.5,
        decode_s=0.5,
        logprobs=[[-0.5, float("-inf")], [1, 128], [[9, 1], [4, 9]], [[-0.5, -0.75], [-0.25, -1.0]]],
    ),
    Finished(request=3, reason="length", record=RECORD, decode_s=0.5),
    Ready(role="draft", info={"contexts": [256, 512], "compiled": False, "dtype": "float32", "none": None}),
    Failed(role="verifier", message="ü\nline", usage=True),
    Failed(role="draft", message="gone", degraded=True, epoch=2),
    Reopen(epoch=1),
    Rejoined(epoch=1),
    Hello(role="draft"),
    Hello(role="verifier", rendezvous={"host": "127.0.0.1", "port": 1234}),
    Welcome(rendezvous={"epoch": 0}),
]


@pytest.fixture(params=["inproc", "zmq-ipc", "zmq-tcp"])
def lanes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[ControlLane, ControlLane]]:
    if request.param == "inproc":
        one, other = InprocLane.pair()
    else:
        one, endpoint = ZmqLane.bind(f"ipc://{tmp_path}/lane" if request.param == "zmq-ipc" else "tcp://127.0.0.1:*")
        other = ZmqLane.connect(endpoint)
    yield one, other
    one.close()
    other.close()


def test_every_type_is_listed() -> None:
    assert {type(message) for message in EVERY} == set(messages._CODEC.types.values())


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_round_trip(lanes: tuple[ControlLane, ControlLane], message: Message) -> None:
    for sender, receiver in (lanes, lanes[::-1]):
        sender.send(message)
        assert receiver.receive(5.0) == message


def test_order_is_kept_both_ways_at_once(lanes: tuple[ControlLane, ControlLane]) -> None:
    one, other = lanes
    for number in range(500):
        one.send(Cancel(request=number))
        other.send(Committed(request=number, tokens=[number] * 20, accepted=0))
    for number in range(500):
        assert other.receive(5.0) == Cancel(request=number)
        assert one.receive(5.0) == Committed(request=number, tokens=[number] * 20, accepted=0)


def test_an_empty_lane_says_so_in_time(lanes: tuple[ControlLane, ControlLane]) -> None:
    began = time.monotonic()
    assert lanes[0].receive(0) is None
    assert lanes[0].receive(0.2) is None
    assert 0.15 < time.monotonic() - began < 3


def test_a_slow_reader_does_not_stop_the_sender(lanes: tuple[ControlLane, ControlLane]) -> None:
    """A front that looks away for thousands of rounds must not hold up the verifier."""
    sender, receiver = lanes
    sender.send(Shutdown())
    assert receiver.receive(5.0) == Shutdown()
    began = time.monotonic()
    for number in range(5000):
        sender.send(Cancel(request=number))
    assert time.monotonic() - began < 10
    assert [receiver.receive(5.0) for _ in range(5000)] == [Cancel(request=number) for number in range(5000)]


def test_sending_to_nobody_fails_instead_of_hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "SEND_S", 1.0)
    lane, endpoint = ZmqLane.bind(f"ipc://{tmp_path}/lane")
    try:
        with pytest.raises(PipelineError):
            lane.send(Shutdown())
        other = ZmqLane.connect(endpoint)
        other.send(Shutdown())
        assert lane.receive(5.0) == Shutdown()  # somebody came
        lane.send(Shutdown())
        assert other.receive(5.0) == Shutdown()
        other.close()
        time.sleep(0.5)
        with pytest.raises(PipelineError):
            lane.send(Shutdown())
    finally:
        lane.close()


GARBAGE = [
    b"",
    b"\xc1",
    b"not msgpack at all",
    msgpack.packb([1, 2]),
    msgpack.packb(7),
    msgpack.packb({}),
    msgpack.packb({"type": "Cancel"}),
    msgpack.packb({"type": "Cancel", "request": 1, "more": 2}),
    msgpack.packb({"type": "Evil", "request": 1}),
    msgpack.packb({"type": ["Cancel"], "request": 1}),
    msgpack.packb({"type": "SamplingParams"}),
    msgpack.packb({"type": "Submit", "request": 1, "prompt": [1], "params": 3}),
    msgpack.packb({"type": "Submit", "request": 1, "prompt": [1], "params": {"temperature": -1.0}}),
    msgpack.packb({"type": "Submit", "request": 1, "prompt": [1], "params": {"temperature": "hot"}}),
    msgpack.packb({"type": "Cancel", "request": b"bytes"}),
    msgpack.packb({"type": "Cancel", "request": msgpack.ExtType(1, b"x")}),
    encode(Cancel(request=1)) + b"trailing",
    encode(Cancel(request=1))[:-1],
    b"\xdd\xff\xff\xff\xff",  # an array said to have 4 billion entries
    b"\x91" * 5000,  # nested beyond any stack
    pickle.dumps(Cancel(request=1)),
]


@pytest.mark.parametrize("raw", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_refused(raw: bytes) -> None:
    with pytest.raises(PipelineError):
        decode(raw)


def test_oversized_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = encode(Admit(slot=0, tokens=[1] * 1000, params=PARAMS, forecasts=False))
    assert decode(raw)
    monkeypatch.setattr(messages._CODEC, "max_bytes", len(raw) - 1)
    monkeypatch.setattr(codec, "_DECODER", None)
    with pytest.raises(PipelineError, match="at most"):
        decode(raw)


def test_garbage_on_the_wire_is_an_error_of_the_pipeline(tmp_path: Path) -> None:
    lane, endpoint = ZmqLane.bind(f"ipc://{tmp_path}/lane")
    stranger = zmq.Context.instance().socket(zmq.PAIR)
    try:
        stranger.connect(endpoint)
        stranger.send(b"hello?")
        with pytest.raises(PipelineError):
            lane.receive(5.0)
    finally:
        stranger.close(linger=0)
        lane.close()


def test_nothing_is_pickled() -> None:
    for path in Path(messages.__file__).parent.glob("*.py"):
        called = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not called & {"send_pyobj", "recv_pyobj", "send_object_list", "broadcast_object_list"}, path


def test_looking_and_sending_in_turns_loses_nothing(tmp_path: Path) -> None:
    """A look without a wait asks ZMQ only when its descriptor says so; what is sent meanwhile may use that sign up."""
    near, endpoint = ZmqLane.bind(f"ipc://{tmp_path}/lane")
    far, count, draw = ZmqLane.connect(endpoint), 3000, random.Random(1)

    def feed() -> None:
        for number in range(count):
            far.send(Cancel(request=number))
            if draw.random() < 0.02:
                time.sleep(1e-4)

    feeding, sent, deadline = threading.Thread(target=feed), 0, time.monotonic() + 60
    feeding.start()
    for number in range(count):
        while (message := near.receive(0)) is None:
            assert time.monotonic() < deadline
            if draw.random() < 0.01:
                near.send(Cancel(request=sent))
                sent += 1
        assert message == Cancel(request=number)
    feeding.join()
    assert [far.receive(5.0) for _ in range(sent)] == [Cancel(request=number) for number in range(sent)]
    near.close()
    far.close()
