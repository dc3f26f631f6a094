"""Meeting places: whatever fails while one is opened, nothing stays open; and an epoch is one from end to end."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ssd.config.load import load_config
from ssd.errors import ConfigError, LinkError, PipelineError
from ssd.pipeline.runtime import draft_main
from ssd.pipeline.runtime.cores import settle
from ssd.pipeline.runtime.draft_main import RankMeeting
from ssd.pipeline.runtime.plan import Plan
from ssd.pipeline.transport import rendezvous as meeting
from ssd.pipeline.transport.lanes import ZmqLane
from ssd.pipeline.transport.links.base import Link
from ssd.pipeline.transport.links.inproc import InprocLink
from ssd.pipeline.transport.links.kinds import LinkPlan, link_kind
from ssd.pipeline.transport.rendezvous import VerifierSide, draft_side, rank_side

SOON_S = 10.0


class Opened:
    """Lanes and stores opened by the code under test, and which of the lanes were closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path):
        self.folder, self.open, self.made, self.fails_at = folder, 0, 0, -1
        self._bind, self._connect, self._close = ZmqLane.bind, ZmqLane.connect, ZmqLane.close
        self._closed: set[ZmqLane] = set()
        monkeypatch.setattr(ZmqLane, "bind", self.bind)
        monkeypatch.setattr(ZmqLane, "connect", self.connect)
        monkeypatch.setattr(ZmqLane, "close", lambda lane: self.close(lane))
        for name in ("create_server",):
            monkeypatch.setattr(socket, name, self.step(getattr(socket, name)))
        monkeypatch.setattr(dist, "TCPStore", self.step(dist.TCPStore))

    def step(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*arguments: Any, **options: Any) -> Any:
            self.made += 1
            if self.made == self.fails_at:
                raise OSError("no more of these")
            return make(*arguments, **options)

        return stepped

    def bind(self, endpoint: str) -> tuple[ZmqLane, str]:
        made = self.step(self._bind)(endpoint)
        self.open += 1
        return made

    def connect(self, endpoint: str) -> ZmqLane:
        lane = self.step(self._connect)(endpoint)
        self.open += 1
        return lane

    def close(self, lane: ZmqLane) -> None:
        if lane not in self._closed:
            self._closed.add(lane)
            self.open -= 1
        self._close(lane)

    def left(self) -> tuple[int, list[str]]:
        return self.open, [path.name for path in self.folder.iterdir()]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Opened:
    return Opened(monkeypatch, tmp_path)


def listening() -> set[str]:
    """Sockets of this process, as the kernel names them."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if (target := os.readlink(f"/proc/self/fd/{descriptor}")).startswith("socket:"):
                found.add(target)
    return found


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 5])
def test_a_verifier_side_that_fails_leaves_nothing(opened: Opened, fails_at: int) -> None:
    """Three lanes, a listening socket, the store: whichever of them fails."""
    before, opened.fails_at = listening(), fails_at
    with pytest.raises((OSError, RuntimeError), match="no more") as caught:
        VerifierSide(timeout_s=5.0, folder=str(opened.folder), ranks=3)
    assert opened.left() == (0, [])
    deadline = time.monotonic() + SOON_S
    while listening() - before and time.monotonic() < deadline:
        time.sleep(0.05)  # ZMQ closes its sockets in its own thread
    assert not listening() - before
    del caught


def test_a_closed_verifier_side_leaves_nothing(opened: Opened) -> None:
    side = VerifierSide(timeout_s=5.0, folder=str(opened.folder), ranks=3)
    side.reopen(1)
    side.reopen(2)
    assert opened.left()[0] == 3
    side.close()
    side.close()
    assert opened.left() == (0, [])
    with pytest.raises(LinkError, match="closed"):
        side.connect()


@pytest.mark.parametrize("kind", ["shared", "host", "gloo"])
def test_a_draft_side_that_fails_leaves_nothing(opened: Opened, kind: str) -> None:
    """The verifier is there and does not come to the link."""
    side = VerifierSide(timeout_s=1.0, folder=str(opened.folder), kind=kind)
    try:
        with pytest.raises(LinkError):
            draft_side(side.rendezvous, timeout_s=1.0)
        assert opened.left()[0] == 1  # the verifier's own lane
    finally:
        side.close()


def test_a_rank_side_that_fails_leaves_nothing(opened: Opened) -> None:
    side = VerifierSide(timeout_s=1.0, folder=str(opened.folder), ranks=2)
    try:
        with pytest.raises(PipelineError):
            rank_side(side.rendezvous, 1, timeout_s=1.0, device="cpu", ordered=True)
        assert opened.left()[0] == 2
    finally:
        side.close()


@pytest.fixture
def three_drafts(tiny_config: Callable[..., dict[str, Any]]) -> Plan:
    config = tiny_config(speculation={"forecast": {"budget": 3}})
    config["draft"]["data_parallel"] = 4
    return Plan(config=load_config(config), vocabulary=128, ends=())


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_meeting_of_ranks_that_fails_leaves_nothing(
    opened: Opened, three_drafts: Plan, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    (opened.folder / "v").mkdir()
    (opened.folder / "d").mkdir()
    side = VerifierSide(timeout_s=5.0, folder=str(opened.folder / "v"))
    publish, calls = meeting.publish, 0

    def failing(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise LinkError("the store is gone")
        publish(*arguments, **options)

    monkeypatch.setattr(draft_main, "publish", failing)
    try:
        with pytest.raises(LinkError, match="store is gone"):
            RankMeeting(three_drafts, side.rendezvous, folder=str(opened.folder / "d"))
        assert opened.open == 1
        assert not list((opened.folder / "d").iterdir())
    finally:
        side.close()


def test_ranks_that_came_are_let_go_when_another_does_not(
    opened: Opened, three_drafts: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = VerifierSide(timeout_s=5.0, folder=str(opened.folder))
    ends: list[InprocLink] = []

    def link(self: VerifierSide) -> Link:
        if len(ends) == 2:
            raise LinkError("it did not come")
        one, other = InprocLink.pair(1.0)
        ends.append(other)
        return one

    ranks = RankMeeting(three_drafts, side.rendezvous, folder=str(opened.folder))
    try:
        monkeypatch.setattr(VerifierSide, "link", link)
        with pytest.raises(LinkError, match="did not come"):
            ranks.link()
        assert [end.arrived for end in ends] == [True, True]  # that the other end closed
    finally:
        ranks.close()
        side.close()
    assert opened.left() == (0, [])


def test_a_link_has_one_epoch_though_another_draft_is_awaited_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """``connect`` runs in its own thread while rounds go on; ``reopen`` may come at any moment of it."""
    side = VerifierSide(timeout_s=5.0, kind="shared")
    endpoint, found = side._endpoint, {}

    def listen(plan: LinkPlan, where: str) -> Link:
        plan.store.set("here", where)
        found["where"] = where
        return InprocLink.pair()[0]

    def interrupted(name: str) -> str:
        if name.startswith("link-"):
            monkeypatch.setattr(side, "_endpoint", endpoint)
            side.reopen(7)
        return endpoint(name)

    monkeypatch.setattr(LinkPlan, "listen", listen)
    monkeypatch.setattr(side, "_endpoint", interrupted)
    try:
        side.connect()
        epoch = found["where"].rpartition("-")[2]
        assert epoch == "0" and side.rendezvous.epoch == 7
        store = side._open()
        assert dist.PrefixStore("link/0", store).check(["here"])
        assert not dist.PrefixStore("link/7", store).check(["here"])
    finally:
        side.close()


@pytest.mark.parametrize("wanted", ["cuda", "cuda:0"])
def test_one_gpu_has_one_name(tiny_config: Callable[..., dict[str, Any]], wanted: str) -> None:
    config = tiny_config()
    config["target"]["device"], config["draft"]["device"] = "cuda:0", wanted
    read = load_config(config)
    assert read.draft is not None and read.draft.device == read.target.device == "cuda:0"
    with pytest.raises(ConfigError, match="two GPUs"):
        link_kind("cuda:0", wanted, "nccl")
    assert link_kind("cuda:0", wanted) == "shared"


def test_other_devices_keep_their_names(tiny_config: Callable[..., dict[str, Any]]) -> None:
    for device in ("cpu", "cuda:3", "mps", "cuda:x"):
        config = tiny_config()
        config["target"]["device"] = device
        assert load_config(config).target.device == device


def test_between_machines_memory_is_not_shared() -> None:
    far = "10.0.0.7"
    assert [link_kind(*pair, host=far) for pair in (("cpu", "cpu"), ("cuda:0", "cpu"), ("cuda:0", "cuda:0"))] == [
        "gloo",
        "host",
        "host",
    ]
    with pytest.raises(ConfigError, match="one Linux machine"):
        link_kind("cpu", "cpu", "shared", host=far)


@pytest.fixture
def ending_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Names of threads that end between being listed and being pinned."""
    real = os.listdir
    gone = threading.Thread(target=lambda: None)
    gone.start()
    gone.join()

    def listed(path: Any = ".") -> list[str]:
        return [str(gone.native_id), *real(path)] if str(path) == "/proc/self/task" else real(path)

    monkeypatch.setattr(os, "listdir", listed)
    yield


def test_a_worker_settles_while_threads_end(ending_threads: None) -> None:
    before = os.sched_getaffinity(0)
    try:
        settle(sorted(before)[:1])
        assert os.sched_getaffinity(0) == set(sorted(before)[:1])
    finally:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), before)
