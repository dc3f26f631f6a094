"""One suite for every link: what the rounds rely on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ssd.errors import LinkError
from ssd.pipeline.transport.links.base import Link
from ssd.pipeline.transport.links.inproc import InprocLink
from ssd.pipeline.transport.rendezvous import VerifierSide, draft_side

PATIENCE_S = 20.0
"""No wait of a test is longer: a hang is a failure, not a stuck run."""


def nccl_devices() -> tuple[str, str] | None:
    """Where NCCL can link two ends on this machine, if anywhere: on two GPUs, or on one from NCCL 2.30 on."""
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return None
    if torch.cuda.device_count() > 1:
        return "cuda:0", "cuda:1"
    return ("cuda:0", "cuda:0") if torch.cuda.nccl.version() >= (2, 30) else None


class Pair:
    """Both ends of a link, and threads to use them from."""

    def __init__(self, kind: str, timeout_s: float):
        self.pool = ThreadPoolExecutor(4)
        self._side, self._lane = None, None
        if kind == "inproc":
            self.verifier, self.draft = InprocLink.pair(timeout_s)
            return
        one, other = nccl_devices() or ("", "") if kind == "nccl" else ("cpu", "cpu")
        self._side = VerifierSide(timeout_s=timeout_s, kind=kind, device=one)
        coming = self.pool.submit(draft_side, self._side.rendezvous, timeout_s=timeout_s, device=other)
        self.verifier: Link = self._side.link()
        self.draft, self._lane = coming.result(PATIENCE_S)

    def both(self, one: Callable[[Link], object], other: Callable[[Link], object]) -> tuple[object, object]:
        """Run one function at each end at the same time."""
        futures = self.pool.submit(one, self.verifier), self.pool.submit(other, self.draft)
        return futures[0].result(PATIENCE_S), futures[1].result(PATIENCE_S)

    def start(self, call: Callable[..., object], *args: object) -> Future:
        return self.pool.submit(call, *args)

    def close(self) -> None:
        self.verifier.close()
        self.draft.close()
        if self._lane is not None and self._side is not None:
            self._lane.close()
            self._side.close()
        self.pool.shutdown(wait=False)


@pytest.fixture(params=["inproc", "shared", "gloo", "host", "nccl"])
def open_pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Pair]]:
    if request.param == "nccl":
        if nccl_devices() is None:
            pytest.skip("needs two GPUs, or one with NCCL 2.30 or later")
        monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")  # read by NCCL when a communicator is made
    pairs: list[Pair] = []

    def make(timeout_s: float = 10.0) -> Pair:
        pairs.append(Pair(request.param, timeout_s))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


def frame(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**31), 2**31 - 1, size, dtype=np.int32)


def test_many_exchanges_of_different_sizes_each_way(open_pair: Callable[..., Pair]) -> None:
    pair, rounds = open_pair(), 200

    def end(link: Link, mine: int, theirs: int, offset: int) -> list[bool]:
        incoming, right = np.zeros(theirs, dtype=np.int32), []
        for number in range(rounds):
            link.exchange(frame(mine, number + offset), incoming)
            right.append(np.array_equal(incoming, frame(theirs, number + 1000 - offset)))
        return right

    results = pair.both(lambda link: end(link, 7, 5000, 0), lambda link: end(link, 5000, 7, 1000))
    assert results == ([True] * rounds, [True] * rounds)


def test_post_returns_while_the_other_end_is_late(open_pair: Callable[..., Pair]) -> None:
    pair, ran = open_pair(), threading.Event()

    def early(link: Link) -> np.ndarray:
        incoming = np.zeros(3, dtype=np.int32)
        pending = link.post(frame(3, 1), incoming)
        ran.set()
        pending.wait()
        return incoming

    def late(link: Link) -> bool:
        before = ran.wait(PATIENCE_S)  # nothing sent from here yet
        link.exchange(frame(3, 2), np.zeros(3, dtype=np.int32))
        return before

    got, before = pair.both(early, late)
    assert before
    assert np.array_equal(got, frame(3, 2))


def test_one_way_between_exchanges(open_pair: Callable[..., Pair]) -> None:
    """The order of a round with a miss: exchange, then trees from the draft, and again."""
    pair = open_pair()

    def verifier(link: Link) -> list[int]:
        seen, incoming, trees = [], np.zeros(4, dtype=np.int32), np.zeros(2, dtype=np.int32)
        for number in range(20):
            link.exchange(np.full(3, number, dtype=np.int32), incoming)
            link.receive(trees)
            seen += [int(incoming[0]), int(trees[1])]
        return seen

    def draft(link: Link) -> list[int]:
        seen, incoming = [], np.zeros(3, dtype=np.int32)
        for number in range(20):
            link.exchange(np.full(4, number + 100, dtype=np.int32), incoming)
            link.send(np.full(2, number + 200, dtype=np.int32))
            seen.append(int(incoming[2]))
        return seen

    seen, drafts = pair.both(verifier, draft)
    assert seen == [value for number in range(20) for value in (number + 100, number + 200)]
    assert drafts == list(range(20))


def test_what_was_sent_is_what_arrives_though_the_sender_reuses_its_buffer(open_pair: Callable[..., Pair]) -> None:
    pair = open_pair()

    def sender(link: Link) -> None:
        buffer = np.zeros(100, dtype=np.int32)
        for number in range(50):
            buffer.fill(number)
            link.send(buffer)

    def receiver(link: Link) -> list[int]:
        incoming, seen = np.zeros(100, dtype=np.int32), []
        for _ in range(50):
            link.receive(incoming)
            assert (incoming == incoming[0]).all()
            seen.append(int(incoming[0]))
        return seen

    assert pair.both(sender, receiver)[1] == list(range(50))


def test_whether_a_frame_has_arrived(open_pair: Callable[..., Pair]) -> None:
    """Or that only receiving tells, and then always so."""
    pair = open_pair()
    tells, incoming = pair.draft.arrived is not None, np.zeros(3, dtype=np.int32)
    assert pair.draft.arrived in (False, None)
    sending = pair.start(pair.verifier.send, frame(3, 1))
    deadline = time.monotonic() + PATIENCE_S
    while tells and not pair.draft.arrived:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pair.draft.receive(incoming)
    sending.result(PATIENCE_S)
    assert np.array_equal(incoming, frame(3, 1))
    assert pair.draft.arrived is (False if tells else None)


@pytest.mark.parametrize("call", ["exchange", "receive"])
def test_a_close_is_seen_at_once(open_pair: Callable[..., Pair], call: str, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["open_pair"] == "nccl":
        pytest.skip("NCCL does not tell that a peer has left: the deadline does")
    pair = open_pair(timeout_s=15.0)
    incoming = np.zeros(3, dtype=np.int32)
    arguments = (frame(3, 0), incoming) if call == "exchange" else (incoming,)
    waiting = pair.start(getattr(pair.verifier, call), *arguments)
    time.sleep(0.2)
    began = time.monotonic()
    pair.draft.close()
    with pytest.raises(LinkError):
        waiting.result(PATIENCE_S)
    assert time.monotonic() - began < 5  # not by the deadline


@pytest.mark.parametrize("call", ["exchange", "receive"])
def test_a_silent_peer_hits_the_deadline(open_pair: Callable[..., Pair], call: str) -> None:
    pair = open_pair(timeout_s=1.0)
    incoming = np.zeros(3, dtype=np.int32)
    arguments = (frame(3, 0), incoming) if call == "exchange" else (incoming,)
    began = time.monotonic()
    with pytest.raises(LinkError):
        pair.start(getattr(pair.verifier, call), *arguments).result(PATIENCE_S)
    assert 0.8 < time.monotonic() - began < 6


def test_a_dead_link_stays_dead(open_pair: Callable[..., Pair]) -> None:
    pair = open_pair(timeout_s=1.0)
    incoming = np.zeros(3, dtype=np.int32)
    with pytest.raises(LinkError):
        pair.start(pair.verifier.receive, incoming).result(PATIENCE_S)
    for call, arguments in (("exchange", (frame(3, 0), incoming)), ("receive", (incoming,)), ("send", (frame(3, 0),))):
        with pytest.raises(LinkError):
            pair.start(getattr(pair.verifier, call), *arguments).result(PATIENCE_S)


@pytest.mark.parametrize("kind", ["inproc", "shared", "host"])
def test_a_frame_of_another_size_is_refused(kind: str) -> None:
    pair = Pair(kind, 10.0)
    try:
        with pytest.raises(LinkError, match="were due"):
            pair.both(lambda link: link.send(frame(3, 0)), lambda link: link.receive(np.zeros(4, dtype=np.int32)))
    finally:
        pair.close()


def test_a_sender_far_ahead_waits_until_the_deadline() -> None:
    pair = Pair("shared", 1.0)
    try:
        for number in range(4):
            pair.verifier.send(frame(3, number))
        with pytest.raises(LinkError, match="for 1 s"):
            pair.verifier.send(frame(3, 4))
    finally:
        pair.close()


def test_use_after_close(open_pair: Callable[..., Pair]) -> None:
    pair = open_pair()
    pair.verifier.close()
    pair.verifier.close()  # twice is fine
    incoming = np.zeros(3, dtype=np.int32)
    for call, arguments in (("exchange", (frame(3, 0), incoming)), ("receive", (incoming,)), ("send", (frame(3, 0),))):
        with pytest.raises(LinkError):
            pair.start(getattr(pair.verifier, call), *arguments).result(PATIENCE_S)


@pytest.mark.parametrize("kind", ["shared", "gloo", "host"])
def test_nobody_comes(kind: str) -> None:
    side = VerifierSide(timeout_s=1.0, kind=kind)
    began = time.monotonic()
    try:
        with pytest.raises(LinkError):
            side.link()
    finally:
        side.close()
    assert time.monotonic() - began < 10


def test_nobody_is_there() -> None:
    side = VerifierSide(timeout_s=1.0)
    rendezvous = side.rendezvous
    side.close()
    with pytest.raises(LinkError):
        draft_side(rendezvous, timeout_s=1.0)


@pytest.mark.parametrize("kind", ["shared", "gloo", "host"])
def test_two_pairs_do_not_meet(kind: str) -> None:
    one, other = Pair(kind, 10.0), Pair(kind, 10.0)
    try:
        for number, pair in enumerate((one, other)):
            incoming = np.zeros(1, dtype=np.int32)
            pair.both(
                lambda link, n=number: link.send(np.full(1, n, dtype=np.int32)),
                lambda link, into=incoming: link.receive(into),
            )
            assert incoming.tolist() == [number]
    finally:
        one.close()
        other.close()
